"""``portattn bench-search``: searches compared on recorded times, without the device."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from portattn.tuner.oracle import Table
    from portattn.tuner.simulate import Course, Summary
    from portattn.tuner.transfer import Transfer

_ENOUGH = 0.95  # of the optimum, for a shape that nobody tuned


def bench_search(
    file: Annotated[
        Path | None,
        typer.Argument(help="Recorded times. Default: those in the tuning database."),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="portattn, random or tpe; may be repeated. Default: all."),
    ] = None,
    evaluations: Annotated[
        list[int] | None, typer.Option(min=1, help="Where to look; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each search on each table.")] = 20,
    noise: Annotated[float, typer.Option(min=0.0, help="Of a time, relative.")] = 0.01,
    record: Annotated[
        Path | None, typer.Option(help="Write the recorded times to this file as well.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
    database: Annotated[
        str | None, typer.Option(help="File or SQLAlchemy URL instead of PORTATTN_DB.")
    ] = None,
) -> None:
    """Show how near to the best recorded config a search comes, by number of evaluations.

    Then, how near what a call gets for a problem that nobody tuned: the best config of the nearest
    recorded problem, each left out in its turn.
    """
    from rich.console import Console

    from portattn.errors import TuningError
    from portattn.tuner import oracle, simulate, transfer
    from portattn.tuner.search import STRATEGIES

    unknown = set(strategy or ()) - set(STRATEGIES)
    if unknown:
        raise TuningError(
            f"strategy is {', '.join(sorted(unknown))}; it must be one of {', '.join(STRATEGIES)}"
        )
    device, tables = _tables(file, database)
    if record is not None:
        _write(record, oracle.dump(device, tables))
    counts = sorted(evaluations or (10, 25, 50, 100))
    console = Console()
    summaries, courses = [], []
    for name in strategy or STRATEGIES:
        found = simulate.courses(tables, name, max(counts), seeds=seeds, noise=noise)
        summaries += [simulate.summarise(found, count) for count in counts]
        courses += found
    _show(console, f"{device}: {len(tables)} tables, {seeds} seeds", summaries)
    untuned = transfer.leave_one_out(tables)
    _show_untuned(console, untuned)
    if out is not None:
        content = {
            "device": device,
            "tables": len(tables),
            "configs": sum(len(table.outcomes) for table in tables),
            "seeds": seeds,
            "noise": noise,
            "searches": [_rounded(dataclasses.asdict(one)) for one in summaries],
            "problems": [_problem(table, courses, max(counts)) for table in tables],
            "untuned": [_rounded(dataclasses.asdict(one)) for one in untuned],
        }
        _write(out, json.dumps(content, indent=1) + "\n")


def _problem(table: Table, courses: Sequence[Course], count: int) -> dict[str, Any]:
    """Each search's worst and mean fraction on one table."""
    found: dict[str, list[float]] = {}
    for course in courses:
        if course.table is table:
            found.setdefault(course.strategy, []).append(course.after(count))
    default = table.outcomes[table.default]
    return {
        "kernel": table.kernel,
        "problem": table.problem,
        "configs": len(table.outcomes),
        "failed": sum(isinstance(outcome, str) for outcome in table.outcomes.values()),
        "optimum_ns": table.optimum_ns,
        "default": round(table.optimum_ns / default, 4) if isinstance(default, int) else 0,
        "worst": {name: round(min(one), 4) for name, one in found.items()},
        "mean": {name: round(sum(one) / len(one), 4) for name, one in found.items()},
    }


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: (None if math.isinf(value) else round(value, 4))
        if isinstance(value, float)
        else value
        for name, value in values.items()
    }


def _show(console: Console, title: str, summaries: Sequence[Summary]) -> None:
    from rich.table import Table as Shown

    shown = Shown(title=f"{title}; fraction of the optimum", title_justify="left")
    shown.add_column("search")
    for heading in ("evaluations", "median", "5 %", "worst", "within 1 %", "within 3 %"):
        shown.add_column(heading, justify="right")
    for one in summaries:
        figures = (f"{value:.3f}" for value in (one.median, one.low, one.worst))
        shares = (f"{100 * share:.1f} %" for share in (one.within_1, one.within_3))
        shown.add_row(one.strategy, str(one.evaluations), *figures, *shares)
    console.print(shown)


def _show_untuned(console: Console, untuned: Sequence[Transfer]) -> None:
    if not untuned:
        return
    good = sum(one.fraction >= _ENOUGH for one in untuned)
    worst = min(untuned, key=lambda one: one.fraction)
    console.print(
        f"problems that nobody tuned: {good} of {len(untuned)} get {100 * _ENOUGH:.0f} % of their "
        f"optimum or more; the worst, {worst.kernel} on {worst.problem}, {worst.fraction:.3f}",
        highlight=False,
        soft_wrap=True,
    )


def _write(path: Path, text: str) -> None:
    from portattn.errors import TuningError

    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise TuningError(f"file {path} cannot be written: {error}") from error


def _tables(file: Path | None, database: str | None) -> tuple[str, list[Table]]:
    from portattn.errors import TuningError
    from portattn.tuner import oracle
    from portattn.tuning_db.store import Store

    if file is None:
        return oracle.from_store(Store(database))
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TuningError(f"file {file} cannot be read: {error}") from error
    return oracle.load(text)
