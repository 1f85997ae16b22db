"""Opening the database for writing: bounds on waiting, WAL, and migrations under a lock."""

from __future__ import annotations

import sqlite3
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy import event

from portattn.errors import TuningError
from portattn.tuning_db import schema
from portattn.tuning_db.location import Location, network_file_system
from portattn.tuning_db.snapshot import REVISIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import alembic.config
    from sqlalchemy.engine.interfaces import DBAPIConnection

BUSY_SECONDS = 30.0
_MIGRATIONS = Path(__file__).parent / "migrations"
# Held while migrating on PostgreSQL; any fixed number that no other program uses.
_POSTGRESQL_LOCK = 0x706F7274617474


def _sqlite_engine(location: Location, busy_seconds: float) -> sqlalchemy.Engine:
    path = location.path
    assert path is not None
    file_system = network_file_system(path)
    if file_system is not None:
        raise TuningError(
            f"tuning database {path} lies on a network file system ({file_system}), where SQLite "
            "loses data. Set "
            "PORTATTN_DB to a local file, or to a PostgreSQL URL to share results"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = sqlalchemy.create_engine(
        location.url, poolclass=sqlalchemy.NullPool, connect_args={"timeout": busy_seconds}
    )

    @event.listens_for(engine, "connect")
    def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = (
            None  # transactions begin where we say, not at the first write
        )
        for pragma in ("trusted_schema=OFF", "foreign_keys=ON", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")
        _use_wal(connection, busy_seconds)

    @event.listens_for(engine, "begin")
    def _on_begin(connection: sqlalchemy.Connection) -> None:
        # A read that later writes could find the lock taken and would fail at once, without
        # waiting.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _server_engine(location: Location, busy_seconds: float) -> sqlalchemy.Engine:
    """An engine on a database server; it keeps a connection, which takes long to make there."""
    url = sqlalchemy.make_url(location.url)
    options: dict[str, Any] = {}
    if url.get_backend_name() == "postgresql" and url.get_driver_name().startswith("psycopg"):
        options["connect_args"] = {"connect_timeout": max(2, int(busy_seconds))}
    # A server that was restarted meanwhile is found again: pre_ping.
    engine = sqlalchemy.create_engine(url, pool_size=1, pool_pre_ping=True, **options)
    if engine.dialect.name == "postgresql":
        wait_ms = int(1000 * busy_seconds)

        @event.listens_for(engine, "connect")
        def _on_connect(connection: DBAPIConnection, _record: object) -> None:
            cursor = connection.cursor()
            for setting in ("lock_timeout", "idle_in_transaction_session_timeout"):
                cursor.execute(f"SET {setting} = {wait_ms}")
            connection.commit()

    return engine


def _use_wal(connection: sqlite3.Connection, busy_seconds: float) -> None:
    """Switch a new file to WAL.

    SQLite does not wait for another process that is doing the same.
    """
    deadline = time.monotonic() + busy_seconds
    while True:
        try:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _current_revision(connection: sqlalchemy.Connection) -> str | None:
    """The stored schema version; None for a database without our tables."""
    if not sqlalchemy.inspect(connection).has_table(schema.VERSION_TABLE):
        return None
    rows = connection.exec_driver_sql(f"SELECT version_num FROM {schema.VERSION_TABLE}").fetchmany(
        2
    )
    return str(rows[0][0]) if rows else None


def migration_config(connection: sqlalchemy.Connection) -> alembic.config.Config:
    """What Alembic's commands need to work on a connection."""
    import alembic.config

    config = alembic.config.Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


@contextmanager
def migrating(engine: sqlalchemy.Engine) -> Iterator[sqlalchemy.Connection]:
    """A connection in a transaction in which tables may be made anew, and nobody else does."""
    is_sqlite = engine.dialect.name == "sqlite"
    with engine.connect() as connection:
        if is_sqlite:
            # SQLite changes a table by making a new one: rows that refer to it must wait. Not
            # possible inside a transaction, and SQLAlchemy begins one here.
            assert connection.connection.dbapi_connection is not None
            connection.connection.dbapi_connection.cursor().execute("PRAGMA foreign_keys=OFF")
        with connection.begin():
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRESQL_LOCK})")
            yield connection
            if is_sqlite:
                broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(1)
                if broken:
                    raise ValueError(f"a row refers to one that is not there: {broken[0]}")


def _check_revision(connection: sqlalchemy.Connection, location: Location) -> str | None:
    revision = _current_revision(connection)
    if revision is not None and revision not in REVISIONS:
        raise TuningError(
            f"tuning database {location.shown} has schema {revision}, newer than this "
            "portattn's "
            f"{schema.HEAD}. Upgrade portattn, or point PORTATTN_DB at another database"
        )
    return revision


def open_engine(location: Location, *, busy_seconds: float = BUSY_SECONDS) -> sqlalchemy.Engine:
    """An engine on a database at the newest schema, made or migrated if need be.

    Args:
        location: which database.
        busy_seconds: how long to wait for another process's lock.

    Raises:
        TuningError: it cannot be opened, written or migrated, is newer, or lies on a network file
            system.
    """
    if not location.url:
        raise TuningError(
            "PORTATTN_DB is 'none', so there is no tuning database to open; unset it, or name a "
            "file"
        )
    if location.is_http:
        raise TuningError(
            f"{location.shown} is a server to read from; to store something, name a file or an "
            "SQLAlchemy URL in PORTATTN_DB or --database"
        )
    try:
        make = _sqlite_engine if location.path is not None else _server_engine
        engine = make(location, busy_seconds)
        with engine.begin() as connection:
            is_current = _check_revision(connection, location) == schema.HEAD
        if not is_current:
            import alembic.command

            with migrating(engine) as connection:
                if _check_revision(connection, location) != schema.HEAD:  # nobody was faster
                    alembic.command.upgrade(migration_config(connection), "head")
    except (
        sqlalchemy.exc.SQLAlchemyError,
        sqlite3.Error,
        OSError,
        ImportError,
        ValueError,
        KeyError,
    ) as error:
        raise unusable(location, error) from error
    return engine


def unusable(location: Location, error: Exception) -> TuningError:
    """The error for a database that cannot be used."""
    reason = str(getattr(error, "orig", None) or error)[:300]
    return TuningError(
        f"tuning database {location.shown} cannot be used: {type(error).__name__}: {reason}. Free "
        "or repair it, or "
        "point PORTATTN_DB at another file"
    )
