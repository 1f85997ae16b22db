"""Reads a tuning database, and cannot write to it.

What it returns is bounded and checked: rows that do not make sense are left out.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy import event, func, select
from sqlalchemy.exc import SQLAlchemyError

from portattn.errors import TuningError
from portattn.report.records import Best, Course, Device, Problem
from portattn.report.rows import (
    CONFIRMED,
    KEY_COLUMNS,
    TEXT_CHARS,
    attempt_of,
    best_of,
    device_of,
    label_of,
    text_of,
    valid,
)
from portattn.tuning_db import schema
from portattn.tuning_db.engine import unusable
from portattn.tuning_db.key import BUCKET_VERSION
from portattn.tuning_db.snapshot import REVISIONS, connect_read_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from sqlalchemy.engine.interfaces import DBAPIConnection

    from portattn.tuning_db.location import Location

MAX_DEVICES = 200
MAX_BESTS = 5000
MAX_ATTEMPTS = 20_000
MAX_COURSE = 2000
SECONDS = 10.0
_INSTRUCTIONS_PER_CHECK = 20_000


def engine_for(location: Location) -> sqlalchemy.Engine:
    """An engine that only reads; what takes longer than `SECONDS` is given up.

    Raises:
        TuningError: there is no such database, or no driver for it.
    """
    if not location.url or location.is_http:
        raise TuningError(
            f"the database is {location.shown}; name an SQLite file or an SQLAlchemy URL in "
            "PORTATTN_DB or --database"
        )
    path = location.path
    if path is None:
        try:
            engine = sqlalchemy.create_engine(location.url, pool_pre_ping=True)
        except (SQLAlchemyError, ImportError) as error:
            raise unusable(location, error) from error
        if engine.dialect.name == "postgresql":
            event.listen(engine, "connect", _only_read_server)
        return engine
    if not path.exists():
        raise TuningError(
            f"there is no tuning database at {location.shown}; run `portattn tune` to make it"
        )

    def connect() -> sqlite3.Connection:
        connection = connect_read_only(path)
        deadline = time.monotonic() + SECONDS
        # A file from elsewhere may hold a view that never ends.
        connection.set_progress_handler(
            lambda: time.monotonic() > deadline, _INSTRUCTIONS_PER_CHECK
        )
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA query_only=ON")
        return connection

    return sqlalchemy.create_engine("sqlite://", creator=connect, poolclass=sqlalchemy.NullPool)


def _only_read_server(connection: DBAPIConnection, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("SET default_transaction_read_only = on")
    cursor.execute(f"SET statement_timeout = {int(1000 * SECONDS)}")
    connection.commit()


class Reader:
    """One tuning database, read only. Safe in several threads.

    Args:
        location: which.

    Raises:
        TuningError: it cannot be read, or is of a newer version.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self._engine = engine_for(location)
        self._revision = self._current_revision()

    def _current_revision(self) -> str:
        query = sqlalchemy.text(f"SELECT version_num FROM {schema.VERSION_TABLE}")
        found = [row["version_num"] for row in self.rows(query)]
        if len(found) != 1 or found[0] not in REVISIONS:
            raise TuningError(
                f"tuning database {self.location.shown} has schema {str(found)[:80]}; this "
                f"portattn knows up to {REVISIONS[-1]}. Upgrade portattn"
            )
        return str(found[0])

    def close(self) -> None:
        """Give connections back."""
        self._engine.dispose()

    def rows(self, query: sqlalchemy.Executable) -> list[dict[str, Any]]:
        """What a query finds.

        Raises:
            TuningError: the database cannot be read now.
        """
        with self.at_once() as rows:
            return rows(query)

    @contextmanager
    def at_once(self) -> Iterator[Callable[[sqlalchemy.Executable], list[dict[str, Any]]]]:
        """A function like `rows` that sees one state of the database in all its queries.

        Raises:
            TuningError: the database cannot be read now.
        """
        try:
            with self._engine.connect() as connection:
                if self._engine.dialect.name == "sqlite":
                    connection.exec_driver_sql("BEGIN")
                else:
                    connection = connection.execution_options(isolation_level="REPEATABLE READ")
                yield lambda query: [dict(row) for row in connection.execute(query).mappings()]
        except (SQLAlchemyError, sqlite3.Error, UnicodeDecodeError) as error:
            raise unusable(self.location, error) from error

    def best_columns(self) -> list[sqlalchemy.ColumnElement[Any]]:
        """The columns of table ``best``; null for those that an older schema does not have."""
        if self._revision != REVISIONS[0]:
            return list(schema.best.columns)
        return [
            sqlalchemy.null().label(one.name) if one.name in CONFIRMED else one
            for one in schema.best.columns
        ]

    def state(self) -> tuple[object, ...]:
        """What changes whenever a best row does."""
        b = schema.best
        query = select(func.count().label("n"), func.max(b.c.updated_us), func.sum(b.c.rev))
        return tuple(self.rows(query.select_from(b))[0].values())

    def devices(self) -> list[Device]:
        """Those with a best config or a measurement, by name."""
        d, b, m = schema.device, schema.best, schema.measurement
        problems = func.count(b.c.problem_id.distinct()).label("n")
        bests = select(b.c.device_id, problems).group_by(b.c.device_id).subquery()
        tried = func.count(m.c.id).label("n")
        measured = select(m.c.device_id, tried).group_by(m.c.device_id).subquery()
        query = (
            select(
                d,
                func.coalesce(bests.c.n, 0).label("problems"),
                func.coalesce(measured.c.n, 0).label("measurements"),
            )
            .outerjoin(bests, bests.c.device_id == d.c.id)
            .outerjoin(measured, measured.c.device_id == d.c.id)
            .order_by(d.c.name, d.c.fp_sha256)
            .limit(MAX_DEVICES)
        )
        found = [one for row in self.rows(query) if (one := valid(device_of, row)) is not None]
        return [one for one in found if one.problems or one.measurements]

    def problems(self, fingerprint: str) -> list[Problem]:
        """What is known of a device: each bucket with its kernels' bests."""
        b, c, p, d = schema.best, schema.config, schema.problem, schema.device
        query = (
            select(
                *(*self.best_columns(), c.c.params_json, p.c.key_sha256),
                *(p.c[name].label(f"key_{name}") for name in KEY_COLUMNS),
            )
            .join_from(b, c, c.c.id == b.c.config_id)
            .join(p, p.c.id == b.c.problem_id)
            .join(d, d.c.id == b.c.device_id)
            .where(d.c.fp_sha256 == fingerprint, p.c.bucket_version == BUCKET_VERSION)
            .order_by(*(p.c[name] for name in KEY_COLUMNS), b.c.median_ns, b.c.kernel_name)
            .limit(MAX_BESTS)
        )
        found: dict[str, tuple[str, list[Best]]] = {}
        for row in self.rows(query):
            best, label = valid(best_of, row), valid(label_of, row)
            if best is not None and label is not None:
                found.setdefault(text_of(row, "key_sha256"), (label, []))[1].append(best)
        return [Problem(key, label, tuple(bests)) for key, (label, bests) in found.items()]

    def courses(self, fingerprint: str, key_sha256: str) -> list[Course]:
        """The newest search of each kernel on a problem, by name."""
        m, c, k = schema.measurement, schema.config, schema.kernel
        d, p = schema.device, schema.problem
        names = ["id", "run_id", "policy", "status", "median_ns", "error_text"]
        names += ["created_us", "shape_json"]
        query = (
            select(*(m.c[name] for name in names), c.c.params_json, k.c.name.label("kernel"))
            .join_from(m, c, c.c.id == m.c.config_id)
            .join(k, k.c.id == c.c.kernel_id)
            .join(d, d.c.id == m.c.device_id)
            .join(p, p.c.id == m.c.problem_id)
            .where(d.c.fp_sha256 == fingerprint, p.c.key_sha256 == key_sha256, m.c.round == 0)
            .order_by(m.c.id.desc())
            .limit(MAX_ATTEMPTS)
        )
        return list(_courses(self.rows(query)))


def _courses(rows: Sequence[Mapping[str, Any]]) -> Iterator[Course]:
    """From rows, the newest first: of each kernel and policy those of one run and shape."""
    newest: dict[tuple[object, object], tuple[object, object]] = {}
    mine: dict[tuple[object, object], list[Mapping[str, Any]]] = {}
    for row in rows:
        which, search = (row["kernel"], row["policy"]), (row["run_id"], row["shape_json"])
        if newest.setdefault(which, search) == search:
            mine.setdefault(which, []).append(row)
    for which in sorted(mine, key=str):
        ordered = mine[which][::-1]
        attempts = [
            one for row in ordered[:MAX_COURSE] if (one := valid(attempt_of, row)) is not None
        ]
        started = ordered[0]["created_us"]
        yield Course(
            *(str(which[0])[:TEXT_CHARS], str(which[1])[:TEXT_CHARS], tuple(attempts)),
            started_us=started if type(started) is int else 0,
            left_out=len(ordered) - len(attempts),
        )
