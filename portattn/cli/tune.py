"""``portattn tune``: the tuner with a progress bar and a summary."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portattn.cli import tune_tables

if TYPE_CHECKING:
    from rich.console import Console

    from portattn.tuner import Case, TuningReport

PARTIAL = 3


def tune(
    problem: Annotated[
        list[str] | None,
        typer.Option(
            help='What to tune, e.g. "b1 h8 kv8 s4096 d64 float32 causal"; may be repeated.'
        ),
    ] = None,
    problems: Annotated[
        Path | None, typer.Option(help="A JSON file with a list of such texts.")
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(help="forward, sparse, documents or decode; may be repeated."),
    ] = None,
    budget: Annotated[
        float, typer.Option(min=0.001, help="Seconds, for all devices and problems.")
    ] = 60.0,
    device: Annotated[
        list[str] | None,
        typer.Option(help="A torch device; may be repeated. Default: every one present."),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="A kernel's name; may be repeated. Default: all but the reference."),
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="File or SQLAlchemy URL instead of PORTATTN_DB.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    most: Annotated[
        int | None,
        typer.Option(min=1, help="Configs to try of a kernel on a problem. Default: what fits."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count configs and estimate the time; run nothing.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Find the fastest config of every kernel on this machine and remember it.

    Every candidate is checked against the float64 reference before it is timed, and the default
    config stays unless another is faster beyond noise. Exits with 3 if the budget ended before the
    last problem.
    """
    from rich.console import Console

    from portattn.tuning_db.store import Store

    console = Console()
    devices = device or _devices()
    chosen = {name: _cases(problem, problems, preset, name) for name in devices}
    if dry_run:
        for name, cases in chosen.items():
            _estimate(console, cases, name, kernel, most)
        return
    store = Store(database)
    is_partial = False
    for index, (name, cases) in enumerate(chosen.items()):
        options = {
            "budget_seconds": budget / len(devices),
            "device": name,
            "kernels": kernel,
            "store": store,
            "seed": seed,
            "most": most,
        }
        report = _run(console, cases, options, progress=progress)
        tune_tables.summary(console, report)
        is_partial = is_partial or bool(report.left_out)
        if index + 1 < len(devices):
            console.print()
    if is_partial:
        raise typer.Exit(PARTIAL)


def _devices() -> list[str]:
    """One GPU of each kind that torch sees, then the CPU: equal devices share their results."""
    import torch

    from portattn.device import device_key

    kinds: dict[str, str] = {}
    for index in range(torch.cuda.device_count()):
        kinds.setdefault(device_key(f"cuda:{index}").fingerprint, f"cuda:{index}")
    return [*kinds.values(), "cpu"]


def _cases(
    texts: list[str] | None, file: Path | None, presets: list[str] | None, device: str
) -> list[Case]:
    from portattn.errors import TuningError
    from portattn.tuner import cases
    from portattn.tuner.presets import preset

    found = [cases.parse(text, device) for text in texts or ()]
    for name in presets or ():
        found += preset(name, device)
    if file is not None:
        try:
            found += cases.parse_json(file.read_text(encoding="utf-8"), device)
        except (OSError, UnicodeDecodeError) as error:
            raise TuningError(f"problems file {file} cannot be read: {error}") from error
    return found or cases.defaults(device)


def _estimate(
    console: Console, cases: list[Case], device: str, kernels: list[str] | None, most: int | None
) -> None:
    """Print what tuning a device would do."""
    from portattn.device import device_key
    from portattn.tuner.estimate import estimate

    key = device_key(device)
    tune_tables.estimate(console, key.name, estimate(cases, key, kernels, most))


def _run(
    console: Console, cases: list[Case], options: dict[str, Any], *, progress: bool
) -> TuningReport:
    """Tune one device, with a progress bar."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from portattn import tuner

    seconds: float = options["budget_seconds"]
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not progress) as bar:
        task = bar.add_task("starting", total=seconds)

        def tell(now: tuner.Progress) -> None:
            text = f"{now.problem + 1}/{now.problems} {now.label}: {now.stage} {now.kernel}"
            if now.feasible:
                text += f" {now.tried}/{now.feasible}"
            if now.best_ns is not None and now.default_ns is not None:
                best, default = map(tune_tables.duration, (now.best_ns, now.default_ns))
                text += f", best {best}, default {default}"
            bar.update(task, completed=min(now.elapsed_s, seconds), description=text)

        return tuner.tune(cases, progress=tell, **options)
