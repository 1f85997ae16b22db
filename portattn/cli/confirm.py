"""``portattn confirm``: every stored best config beside the default, in fresh processes."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from portattn.tuner.stored import StoredRow


def confirm(
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    kernel: Annotated[
        list[str] | None, typer.Option(help="A kernel's name; may be repeated. Default: all.")
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(min=0.0, help="Of timing, for each row; at least five rounds are done."),
    ] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this JSON file.")] = None,
    database: Annotated[
        str | None, typer.Option(help="File or SQLAlchemy URL instead of PORTATTN_DB.")
    ] = None,
) -> None:
    """Verify and time every stored config beside its kernel's default.

    Each problem gets a fresh process. Exits with 1 if a config is wrong, or slower beyond the
    interval of paired samples.
    """
    from rich.console import Console

    from portattn.device import device_key
    from portattn.errors import TuningError
    from portattn.tuner import stored
    from portattn.tuning_db.store import Store

    console, key = Console(), device_key(device)
    rows = stored.confirm_stored(Store(database), key, device, kernels=kernel, seconds=seconds)
    found = list(rows)
    _show(console, key.name, found)
    if out is not None:
        try:
            out.write_text(stored.dump(key.name, found), encoding="utf-8", newline="\n")
        except OSError as error:
            raise TuningError(f"file {out} cannot be written: {error}") from error
    if any(row.is_bad for row in found):
        raise typer.Exit(1)


def _show(console: Console, device: str, rows: list[StoredRow]) -> None:
    from rich.table import Table

    from portattn.report.text import duration

    table = Table(title=f"{device}: {len(rows)} stored configs", title_justify="left")
    table.add_column("problem")
    table.add_column("kernel", overflow="fold")
    for heading in ("default", "stored", "of the default's time", "95 %"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        done = row.confirmation
        cells = ("-",) * 4
        if done is not None and done.ratio is not None:
            ratio = done.ratio
            cells = (
                duration(done.default_ns),
                duration(done.best_ns),
                f"{ratio.median:.3f}",
                f"{ratio.low:.3f}-{ratio.high:.3f}",
            )
        table.add_row(f"{row.label} {row.policy}", row.kernel, *cells, row.status)
    console.print(table)
    for row in rows:
        if row.reason:
            text = f"{row.status}: {row.kernel} on {row.label}: {row.reason}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    counts = {one.status: sum(row.status == one.status for row in rows) for one in rows}
    text = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    console.print(text or "nothing is stored for this device", highlight=False)
