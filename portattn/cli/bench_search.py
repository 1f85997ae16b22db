"""``portattn bench-search``: searches compared on recorded times, without the device."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from portattn.tuner.oracle import Table


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
    database: Annotated[
        str | None, typer.Option(help="File or SQLAlchemy URL instead of PORTATTN_DB.")
    ] = None,
) -> None:
    """Show how near to the best recorded config a search comes, by number of evaluations."""
    from rich.console import Console
    from rich.table import Table as Shown

    from portattn.errors import TuningError
    from portattn.tuner import oracle, simulate
    from portattn.tuner.search import STRATEGIES

    unknown = set(strategy or ()) - set(STRATEGIES)
    if unknown:
        raise TuningError(
            f"strategy is {', '.join(sorted(unknown))}; it must be one of {', '.join(STRATEGIES)}"
        )
    device, tables = _tables(file, database)
    if record is not None:
        try:
            record.write_text(oracle.dump(device, tables), encoding="utf-8", newline="\n")
        except OSError as error:
            raise TuningError(f"file {record} cannot be written: {error}") from error
    counts = sorted(evaluations or (10, 25, 50, 100))
    title = f"{device}: {len(tables)} tables, {seeds} seeds; fraction of the optimum"
    shown = Shown(title=title, title_justify="left")
    shown.add_column("search")
    for heading in ("evaluations", "median", "5 %", "worst", "within 1 %"):
        shown.add_column(heading, justify="right")
    for one in simulate.compare(tables, strategy or STRATEGIES, counts, seeds=seeds, noise=noise):
        figures = (f"{value:.3f}" for value in (one.median, one.low, one.worst))
        shown.add_row(one.strategy, str(one.evaluations), *figures, f"{100 * one.within:.0f} %")
    Console().print(shown)


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
