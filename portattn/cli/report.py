"""``portattn report``: the tuning database as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    file: Annotated[Path, typer.Argument(help="Where to.")] = Path("portattn-report.html"),
    problem: Annotated[
        str, typer.Option(help='Only problems whose text holds this, e.g. "d128" or "causal".')
    ] = "",
    kernel: Annotated[str, typer.Option(help="Only kernels whose name holds this.")] = "",
    device: Annotated[
        str, typer.Option(help="Only devices whose name, family or fingerprint holds this.")
    ] = "",
    database: Annotated[
        str | None, typer.Option(help="File or SQLAlchemy URL instead of PORTATTN_DB.")
    ] = None,
) -> None:
    """Write one HTML file: bests against defaults, how they were found, what was rejected and why.

    The file holds its own style, script and charts, and loads nothing. Reads only.
    """
    from portattn.errors import TuningError
    from portattn.report.reader import Reader
    from portattn.report.write import report as written
    from portattn.tuning_db.location import locate

    text = written(Reader(locate(database)), problem=problem, kernel=kernel, device=device)
    try:
        file.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise TuningError(f"file {file} cannot be written: {error}") from error
    typer.echo(f"wrote {file}, {len(text) // 1024} KB")
