"""``portattn tune``: the tuner with a progress bar and a summary."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from portattn.tuner import Case, KernelReport, TuningReport

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
    store = Store(database)
    devices = device or _devices()
    is_partial = False
    for index, name in enumerate(devices):
        cases = _cases(problem, problems, name)
        seconds = budget / len(devices)
        report = _run(console, cases, name, seconds, kernel, store, seed, progress=progress)
        _summary(console, report)
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


def _cases(texts: list[str] | None, file: Path | None, device: str) -> list[Case]:
    from portattn.errors import TuningError
    from portattn.tuner import cases

    found = [cases.parse(text, device) for text in texts or ()]
    if file is not None:
        try:
            found += cases.parse_json(file.read_text(encoding="utf-8"), device)
        except (OSError, UnicodeDecodeError) as error:
            raise TuningError(f"problems file {file} cannot be read: {error}") from error
    return found or cases.defaults(device)


def _run(
    console: Console,
    cases: list[Case],
    device: str,
    seconds: float,
    kernels: list[str] | None,
    store: object,
    seed: int,
    *,
    progress: bool,
) -> TuningReport:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from portattn import tuner
    from portattn.tuning_db.store import Store

    assert isinstance(store, Store)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not progress) as bar:
        task = bar.add_task("starting", total=seconds)

        def tell(now: tuner.Progress) -> None:
            text = f"{now.problem + 1}/{now.problems} {now.label}: {now.stage} {now.kernel}"
            if now.feasible:
                text += f" {now.tried}/{now.feasible}"
            if now.best_ns is not None and now.default_ns is not None:
                text += f", best {duration(now.best_ns)}, default {duration(now.default_ns)}"
            bar.update(task, completed=min(now.elapsed_s, seconds), description=text)

        return tuner.tune(
            cases,
            budget_seconds=seconds,
            device=device,
            kernels=kernels,
            store=store,
            progress=tell,
            seed=seed,
        )


def duration(time_ns: int) -> str:
    """A time for people: three digits and a unit."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if time_ns >= size:
            return (
                f"{time_ns / size:.3g} {unit}"
                if time_ns < 1000 * size
                else f"{time_ns / size:.0f} {unit}"
            )
    return f"{time_ns} ns"


def _summary(console: Console, report: TuningReport) -> None:
    from rich.table import Table

    table = Table(title=f"{report.device}, {report.seconds:.0f} s", title_justify="left")
    table.add_column("problem")
    table.add_column("kernel", overflow="fold")
    for heading in ("tried", "default", "best", "gain"):
        table.add_column(heading, justify="right")
    table.add_column("config", overflow="fold")
    for problem in report.problems:
        for index, kernel in enumerate(problem.kernels):
            table.add_row(
                problem.label if index == 0 else "",
                *_cells(kernel, is_fastest=kernel.name == problem.fastest),
            )
        table.add_section()
    console.print(table)
    _left_out(console, report)
    console.print(f"stored in {report.database}", highlight=False, soft_wrap=True)


def _left_out(console: Console, report: TuningReport) -> None:
    """What was not tuned, what was rejected, and why; the same reason once."""
    lines: dict[str, int] = {}
    for problem in report.problems:
        for name, why in problem.refused.items():
            line = f"not tuned: {name}: {'; '.join(why)}"
            lines[line] = lines.get(line, 0) + 1
    for line, count in lines.items():
        console.print(
            line + (f" ({count} problems)" if count > 1 else ""), highlight=False, soft_wrap=True
        )
    for problem in report.problems:
        for kernel in problem.kernels:
            for params, status, reason in kernel.rejected[:3]:
                text = f"{kernel.name} {fields(params)} on {problem.label}: {status}: {reason}"
                console.print(f"rejected: {text}", highlight=False, markup=False, soft_wrap=True)
            if len(kernel.rejected) > 3:
                more = len(kernel.rejected) - 3
                console.print(
                    f"rejected: {more} more configs of {kernel.name} on {problem.label}",
                    highlight=False,
                )
    for label in report.left_out:
        console.print(f"not reached within the budget: {label}", highlight=False)


def fields(params: dict[str, int | bool | str]) -> str:
    """A config on one line."""
    return " ".join(f"{name}={value}" for name, value in params.items()) or "(no fields)"


def _cells(kernel: KernelReport, *, is_fastest: bool) -> tuple[str, ...]:
    name = f"{kernel.name}{' *' if is_fastest else ''}"
    tried = f"{kernel.tried}/{kernel.feasible}"
    if kernel.params is None:
        return name, tried, "-", "-", "-", "the default config does not work"
    config = "default" if kernel.kept_default else fields(kernel.params)
    return (
        name,
        tried,
        duration(kernel.default_ns),
        duration(kernel.best_ns),
        f"{kernel.gain:.3f}x",
        config,
    )
