"""``portattn bench``: problems, kernels and peers, measured in turn in one run."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path  # noqa: TC003 typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from portattn.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from portattn.bench.session import Settings
    from portattn.bench.workloads import Workload

LOG_WIDTH = 130  # where the output is no terminal
_WARM_SHARE = 0.5  # of the budget, at most, for compiling


def bench(
    preset: Annotated[
        list[str] | None,
        typer.Option(help="A set of problems; may be repeated. Default: all that the device has."),
    ] = None,
    problem: Annotated[
        list[str] | None,
        typer.Option(help="One problem in words, e.g. 'b1 h16 s4096 d128 causal'."),
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="A kernel or backend; may be repeated. Default: all.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="A peer, or 'none'; may be repeated. Default: all.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="A torch device. Default: cuda if there is one, else cpu.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only rows whose name holds this; may be repeated."),
    ] = None,
    budget_s: Annotated[
        float, typer.Option(help="Seconds in all; no row and no contender begins after them.")
    ] = 500,
    seconds: Annotated[float, typer.Option(help="To time each contender of a row.")] = 0.3,
    limit_s: Annotated[
        float, typer.Option(help="A contender that is not ready after this is left out.")
    ] = 60,
    warm_up: Annotated[
        bool, typer.Option(help="On a GPU, compile in many processes before anything is timed.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file, written after every row.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows of --out and leave them out here.")
    ] = False,
    append: Annotated[
        bool, typer.Option("--append", help="Keep the rows of --out, but measure these again.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG of all rows of --out.")] = None,
) -> None:
    """Measure kernels beside their peers, in turns, each result checked against float64 first.

    Exits with 1 if a kernel of portattn gave a wrong result or failed, with 3 if the budget ended
    before the last row.
    """
    end = time.monotonic() + budget_s
    import torch

    from portattn.bench import limits, results, session

    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH, soft_wrap=True)
    where = _device(device)
    rows = _rows(preset, problem, only, where)
    settings = dataclasses.replace(
        _settings(where, kernel, peer), seconds=seconds, limit_seconds=limit_s
    )
    if where.type == "cuda":
        torch.cuda.set_device(where)
    measured = limits.device_limits(where)
    run = results.describe_run(where) | {
        "limits": limits.as_dict(measured),
        "arguments": [_without_folder(one) for one in sys.argv[1:]],
    }
    store = results.Results(out, run, keep=resume or append)
    if resume:
        rows = [row for row in rows if row.name not in store.names]
    console.print(
        f"{run['device']}: matmul {measured.matmul_tflops:.4g} TFLOP/s, read "
        f"{measured.read_tbps:.3g} TB/s; {len(rows)} rows"
    )
    if warm_up and where.type == "cuda" and rows:
        share = min(_WARM_SHARE * budget_s, end - time.monotonic())
        settings = _warm(rows, settings, console, share)
    from portattn.cli.bench_tables import row_table

    left = session.run(
        rows, settings, measured, store, end, lambda row: console.print(row_table(row)), _say
    )
    _finish(console, where, store.document, left, plot)


def _without_folder(argument: str) -> str:
    """An argument that names a file without the folders of this machine."""
    option, equals, value = argument.rpartition("=")
    return option + equals + os.path.basename(value)


def _device(name: str | None) -> torch.device:
    """The device asked for, with its index."""
    import torch

    chosen = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def _rows(
    presets: list[str] | None,
    problems: list[str] | None,
    only: list[str] | None,
    device: torch.device,
) -> list[Workload]:
    """The rows asked for, in order.

    Raises:
        BadParameter: a name is unknown, or nothing is left.
    """
    from portattn.bench import workloads

    try:
        chosen = presets or ([] if problems else list(workloads.PRESETS))
        rows = [workloads.parse(text) for text in problems or ()]
        rows += [row for name in chosen for row in workloads.preset(name)]
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if device.type != "cuda":
        rows = [row for row in rows if row.metric != "host"]
    rows = [row for row in rows if not only or any(text in row.name for text in only)]
    if not rows:
        raise typer.BadParameter(
            f"no row is left on {device} (presets {', '.join(chosen)}; the host preset needs a "
            f"GPU; --only is {', '.join(only or ['not given'])})"
        )
    return rows


def _settings(
    device: torch.device, kernels: list[str] | None, peers: list[str] | None
) -> Settings:
    from portattn import dispatch
    from portattn.bench import contender
    from portattn.bench.peers import peer_names
    from portattn.bench.session import Settings

    try:
        own = contender.own_names(kernels)
        if kernels is None:  # kernels of other devices would only fill the table with refusals
            own = [name for name in own if not dispatch.absence(name, device.type)]
        none = peers == ["none"]
        others = [] if none else peer_names(device.type, peers)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    return Settings(device, tuple(own), tuple(others))


def _warm(rows: list[Workload], settings: Settings, console: Console, seconds: float) -> Settings:
    """Fill the compilers' caches; the settings without what must not run here."""
    from portattn.bench.warmup import fill_caches

    started = time.monotonic()
    found = fill_caches(rows, settings.kernels, settings.peers, settings.device, seconds)
    spent = time.monotonic() - started
    console.print(f"compiled in {spent:.0f} s; {found.left} compiles were left for later")
    for (row, name), why in found.dangerous.items():
        console.print(f"left out of {row}: {name} {why}", style="red", markup=False)
    return dataclasses.replace(settings, dangerous=found.dangerous)


def _say(text: str) -> None:
    """What is about to be done, so that a log ends with what did not return."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _finish(
    console: Console,
    device: torch.device,
    document: dict[str, Any],
    left: list[Workload],
    plot: Path | None,
) -> None:
    """Picture, summary and exit code."""
    from portattn.bench.rounds import is_lost
    from portattn.cli.bench_tables import summary_table

    if plot is not None:
        from portattn.bench.plot import plot as draw

        draw(document, plot)
        console.print(f"drawn in {plot}")
    newest = len(document["runs"]) - 1
    console.print(summary_table(document["rows"]))
    failed = [
        f"{row['name']}: {name}: {why}"
        for row in document["rows"]
        if row["run"] == newest
        for name, why in _failures(row)
    ]
    for text in failed:
        console.print(f"FAILED {text}", style="bold red", markup=False)
    for row in left:
        console.print(f"not measured: {row.name}", markup=False)
    if left and is_lost(device):
        console.print("A kernel crashed or hung: --resume measures the rest.", style="bold red")
        sys.stdout.flush()
        os._exit(1)  # leaving the usual way would wait for the GPU
    if failed:
        raise typer.Exit(1)
    if left:
        raise typer.Exit(3)


def _failures(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What must not happen: a row that broke, or a kernel that did not refuse and is wrong."""
    from portattn.backends.registry import KERNELS

    if "error" in row:
        return [("row", row["error"])]
    return [
        (name, why)
        for name, why in row["not_run"].items()
        if name.partition(" ")[0] in KERNELS and not why.startswith("refused")
    ]
