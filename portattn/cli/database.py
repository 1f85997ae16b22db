"""``portattn export-db`` and ``portattn import-db``: the tuning database as JSON."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from portattn.tuning_db.store import Store

_DATABASE = typer.Option(help="File or SQLAlchemy URL instead of PORTATTN_DB.")


def export_db(
    file: Annotated[
        Path | None, typer.Argument(help="Where to; default: standard output.")
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(help="Write the best configs of this device family as a seeds file instead."),
    ] = "",
    database: Annotated[str | None, _DATABASE] = None,
) -> None:
    """Write the tuning database as JSON: same content, same bytes."""
    from portattn.errors import TuningError
    from portattn.tuning_db import seeds as seed_files
    from portattn.tuning_db.exchange import export_text
    from portattn.tuning_db.snapshot import read

    store = existing(database)
    text = seed_files.dump(seeds, read(store.location).rows) if seeds else export_text(store)
    if file is None:
        typer.echo(text, nl=False)
        return
    try:
        file.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise TuningError(f"file {file} cannot be written: {error}") from error
    typer.echo(f"wrote {file}, {len(text)} bytes")


def import_db(
    file: Annotated[Path, typer.Argument(help="A file of `portattn export-db`.")],
    database: Annotated[str | None, _DATABASE] = None,
) -> None:
    """Merge an exported file into the tuning database; of two best configs the faster stays.

    The file is checked whole before anything is written, and written in one transaction.
    """
    from portattn.errors import TuningError
    from portattn.tuning_db.exchange import MAX_CHARS, import_text
    from portattn.tuning_db.store import Store

    try:
        if file.stat().st_size > MAX_CHARS:
            raise TuningError(
                f"file {file} has {file.stat().st_size} bytes; at most {MAX_CHARS} are taken"
            )
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TuningError(f"file {file} cannot be read: {error}") from error
    store = Store(database)
    added = import_text(store, text)
    counts = (
        ", ".join(f"{count} {table}" for table, count in added.items() if count) or "nothing new"
    )
    typer.echo(f"imported into {store.location.shown}: {counts}")


def existing(database: str | None) -> Store:
    """The store, which must be there: reading makes no database."""
    from portattn.errors import TuningError
    from portattn.tuning_db.location import locate
    from portattn.tuning_db.store import Store

    location = locate(database)
    if location.path is not None and not location.path.exists():
        raise TuningError(
            f"there is no tuning database at {location.shown}; run `portattn tune` to make it"
        )
    return Store(database)
