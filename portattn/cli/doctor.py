"""``portattn doctor``: what works on this machine, what is missing and why."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from portattn.tuner import Case


def doctor(
    problem: Annotated[
        list[str] | None,
        typer.Option(
            help='Explain this call, e.g. "b1 h8 s4096 d64 float32 causal"; may be repeated.'
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="The call's backend argument.")] = "auto",
    database: Annotated[
        str | None, typer.Option(help="File or SQLAlchemy URL instead of PORTATTN_DB.")
    ] = None,
) -> None:
    """Say what works here: devices, library, kernels, tuning database, and what a call would run.

    Exits with 1 if the library cannot be loaded or the database cannot be used.
    """
    from rich.console import Console

    from portattn.tuner import cases

    console = Console(soft_wrap=True, highlight=False, markup=False)
    devices = _devices(console)
    is_well = _library(console)
    _kernels(console, [case for device in devices for case in cases.defaults(device)])
    is_well = _database(console, database) and is_well
    calls = (
        [cases.defaults(device)[0] for device in devices]
        if not problem
        else [cases.parse(text, device) for text in problem for device in devices]
    )
    _calls(console, calls, backend)
    if not is_well:
        raise typer.Exit(1)


def _devices(console: Console) -> list[str]:
    import platform

    import torch

    from portattn import __version__
    from portattn.device import device_key

    console.print(
        f"portattn {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    names = [*(f"cuda:{index}" for index in range(torch.cuda.device_count())), "cpu"]
    console.print("\ndevices")
    for name in names:
        key = device_key(name)
        units = (
            f"{key.cores} cores, {key.threads} threads"
            if key.kind == "cpu"
            else f"{key.cores} multiprocessors"
        )
        console.print(
            f"  {name}: {key.name}, {key.family}, {units}, fingerprint {key.fingerprint[:8]}"
        )
        if key.isa:
            console.print(f"    {' '.join(key.isa)}")
    if len(names) == 1:
        reason = (
            "torch sees none"
            if torch.version.cuda or torch.version.hip
            else "this torch is built without CUDA"
        )
        console.print(f"  no GPU: {reason}")
    return names


def _library(console: Console) -> bool:
    from portattn import native
    from portattn.errors import PortattnError

    console.print("\nlibrary")
    try:
        path = native.library_path()
        native.library()
    except PortattnError as error:
        console.print(f"  {error}")
        return False
    console.print(f"  {path}: ABI {native.ABI_VERSION}")
    try:
        from portattn.backends.cpu import abi

        console.print(f"  CPU kernels compiled for {abi.isa()}")
    except (PortattnError, AttributeError) as error:
        console.print(f"  no CPU kernels in it: {error}")
        return False
    return True


def _kernels(console: Console, examples: list[Case]) -> None:
    """Whether each kernel can run one of the ordinary problems, and else why not."""
    from portattn import dispatch
    from portattn.backends import registry

    console.print("\nkernels, in order of preference")
    for name, (backend, *_) in registry.KERNELS.items():
        refused = [
            (case.problem.device, dispatch.refusals(name, case.problem, is_named=False))
            for case in examples
        ]
        able = dict.fromkeys(device for device, reasons in refused if not reasons)
        if able:
            console.print(f"  {name} ({backend}): runs on {', '.join(able)}")
        else:
            console.print(f"  {name} ({backend}): not here: {'; '.join(refused[0][1])}")


def _database(console: Console, database: str | None) -> bool:
    from portattn.tuning_db import seeds
    from portattn.tuning_db.location import locate
    from portattn.tuning_db.snapshot import read

    location = locate(database)
    found = read(location)
    seed_rows, seed_problems = seeds.load_all()
    console.print(
        f"\ntuning database\n  {location.shown}: "
        f"{found.state}{': ' if found.detail else ''}{found.detail}"
    )
    if found.state == "ok":
        invalid = f", {found.invalid_rows} invalid ones not used" if found.invalid_rows else ""
        console.print(f"  {len(found.rows)} best configs{invalid}")
    elif found.state == "missing":
        console.print("  default configs run until `portattn tune` has run")
    console.print(f"  {len(seed_rows)} shipped seeds")
    for text in seed_problems:
        console.print(f"  bad seeds file {text}")
    return found.state in ("ok", "missing", "off") and not found.invalid_rows and not seed_problems


def _calls(console: Console, calls: list[Case], backend: str) -> None:
    from portattn.explanation import explain_problem
    from portattn.tuning_db import TuningDatabaseWarning

    for case in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TuningDatabaseWarning)  # said above
            told = str(explain_problem(case.problem, backend))
        console.print(f"\nmask     {case.mask if case.mask is not None else 'none'}\n{told}")
