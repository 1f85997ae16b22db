"""``portattn show``: what the tuning database holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from portattn.tuning_db.snapshot import StoredConfig


def show(
    problem: Annotated[
        str, typer.Option(help='Only problems whose text holds this, e.g. "d128" or "causal".')
    ] = "",
    kernel: Annotated[str, typer.Option(help="Only kernels whose name holds this.")] = "",
    database: Annotated[
        str | None, typer.Option(help="File or SQLAlchemy URL instead of PORTATTN_DB.")
    ] = None,
) -> None:
    """Show devices, problems and the best config of each kernel against its default.

    Exits with 1 if there is a database and it cannot be read.
    """
    from rich.console import Console

    from portattn.errors import TuningError
    from portattn.tuning_db.location import locate
    from portattn.tuning_db.snapshot import read

    console = Console()
    location = locate(database)
    found = read(location)
    if found.state in ("missing", "off"):
        console.print(
            f"no tuning database at {location.shown}: run `portattn tune`",
            soft_wrap=True,
            highlight=False,
        )
        return
    if found.state != "ok":
        raise TuningError(
            f"tuning database {location.shown} is {found.state}: {found.detail}. `portattn "
            "doctor` says more"
        )
    rows = [row for row in found.rows if problem in row.key.label and kernel in row.kernel_name]
    console.print(f"{location.shown}: {len(rows)} best configs", soft_wrap=True, highlight=False)
    if found.invalid_rows:
        console.print(f"{found.invalid_rows} invalid rows are not used", highlight=False)
    for fingerprint in dict.fromkeys(row.device_fingerprint for row in rows):
        _device(console, [row for row in rows if row.device_fingerprint == fingerprint])


def _device(console: Console, rows: list[StoredConfig]) -> None:
    from rich.table import Table

    from portattn.report.text import duration, fields

    first = rows[0]
    title = f"{first.device_name} ({first.family}, device {first.device_fingerprint[:8]})"
    table = Table(title=title, title_justify="left")
    for heading in ("problem", "kernel", "config"):
        table.add_column(heading, overflow="fold")
    for heading in ("default", "best", "gain"):
        table.add_column(heading, justify="right")
    table.add_column("from")
    for key in dict.fromkeys(row.key for row in rows):
        ranked = sorted((row for row in rows if row.key == key), key=lambda row: row.median_ns)
        for index, row in enumerate(ranked):
            table.add_row(
                key.label if index == 0 else "",
                row.kernel_name,
                fields(row.params),
                duration(row.default_ns),
                duration(row.median_ns),
                f"{row.default_ns / row.median_ns:.3f}x",
                row.origin,
            )
        table.add_section()
    console.print(table)
