"""What ``portattn tune`` prints: its summary, and the estimate of a dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portattn.report.text import duration, fields

if TYPE_CHECKING:
    from rich.console import Console

    from portattn.tuner import KernelReport, TuningReport
    from portattn.tuner.estimate import ProblemEstimate


_MOST_REASONS = 5


def summary(console: Console, report: TuningReport) -> None:
    """The best configs, what was left out, and why."""
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
            _rejected(console, kernel, problem.label)
    for label in report.left_out:
        console.print(f"not reached within the budget: {label}", highlight=False)


def _rejected(console: Console, kernel: KernelReport, label: str) -> None:
    """Configs of a kernel that were not right, or not faster in another process."""
    if kernel.unconfirmed:
        text = f"default kept: {kernel.name} on {label}: {kernel.unconfirmed}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for params, status, reason in kernel.rejected[:3]:
        text = f"{kernel.name} {fields(params)} on {label}: {status}: {reason}"
        console.print(f"rejected: {text}", highlight=False, markup=False, soft_wrap=True)
    if len(kernel.rejected) > 3:
        more = len(kernel.rejected) - 3
        console.print(
            f"rejected: {more} more configs of {kernel.name} on {label}",
            highlight=False,
        )


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


def estimate(console: Console, device: str, problems: list[ProblemEstimate]) -> None:
    """Configs of each kernel, why the others cannot run, and the time that trying them takes."""
    from rich.table import Table

    table = Table(title=f"{device}: nothing is run", title_justify="left")
    table.add_column("problem")
    table.add_column("kernel", overflow="fold")
    for heading in ("declared", "feasible", "tried", "seconds"):
        table.add_column(heading, justify="right")
    for problem in problems:
        for index, kernel in enumerate(problem.kernels):
            table.add_row(
                problem.label if index == 0 else "",
                kernel.name,
                *map(str, (kernel.declared, kernel.feasible, kernel.tried)),
                f"{kernel.seconds:.0f}",
            )
        table.add_section()
    console.print(table)
    refused = {
        f"not tuned: {name}: {'; '.join(why)}": None
        for problem in problems
        for name, why in problem.refused.items()
    }
    for line in refused:
        console.print(line, highlight=False, soft_wrap=True)
    for line in _rejections(problems):
        console.print(line, highlight=False, soft_wrap=True)
    total = sum(kernel.seconds for problem in problems for kernel in problem.kernels)
    console.print(f"about {total:.0f} s for all; --budget ends it earlier", highlight=False)


def _rejections(problems: list[ProblemEstimate]) -> list[str]:
    """Of each kernel the most frequent reasons against configs, over all problems."""
    counts: dict[str, dict[str, int]] = {}
    for problem in problems:
        for kernel in problem.kernels:
            mine = counts.setdefault(kernel.name, {})
            for reason, count in kernel.infeasible.items():
                mine[reason] = mine.get(reason, 0) + count
    return [
        f"not feasible: {name}: {count} configs: {reason}"
        for name, mine in counts.items()
        for reason, count in sorted(mine.items(), key=lambda entry: -entry[1])[:_MOST_REASONS]
    ]
