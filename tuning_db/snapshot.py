"""Reads every best row once, read-only, for `lookup`.

Never raises: a bad database is a state, a bad row is skipped.

SQLite files are read through the standard library (2 ms, against 150 ms for importing SQLAlchemy),
other databases through SQLAlchemy; the SQL is the same text. Everything read is data: JSON text,
checked for type and size.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import time
import urllib.parse
from typing import TYPE_CHECKING, Any

from portattn.tuning_db.key import BUCKET_VERSION, ProblemKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from portattn.tuning_db.location import Location

# Migrations that this version knows, oldest first.
REVISIONS = ("0001", "0002")

MAX_ROWS = 100_000
MAX_JSON_CHARS = 65536
# A call of attention() waits this long for a locked database, and reads for at most this long.
BUSY_SECONDS = 0.25
READ_SECONDS = 2.0
_INSTRUCTIONS_PER_CHECK = 20_000

_KEY_FIELDS = tuple((field.name, field.type) for field in dataclasses.fields(ProblemKey))
_HEAD_COLUMNS = (
    *(
        "b.kernel_name",
        "b.backend",
        "b.toolchain_class",
        "b.median_ns",
        "b.default_ns",
        "b.source",
    ),
    *("d.fp_sha256", "d.family", "d.name", "k.source_sha256", "c.params_json"),
    "b.policy",
)
COLUMNS = (*_HEAD_COLUMNS, *(f"p.{name}" for name, _ in _KEY_FIELDS))
_VERSION_SQL = "SELECT version_num FROM portattn_version"
_READ_SQL = (
    f"SELECT {', '.join(COLUMNS)} "
    "FROM best b JOIN device d ON d.id = b.device_id JOIN config c ON c.id = b.config_id "
    "JOIN kernel k ON k.id = c.kernel_id JOIN problem p ON p.id = b.problem_id "
    f"WHERE length(c.params_json) < {MAX_JSON_CHARS} AND p.bucket_version = {BUCKET_VERSION} "
    "ORDER BY b.kernel_name, b.problem_id, b.device_id, b.toolchain_class, b.policy LIMIT "
    f"{MAX_ROWS}"
)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredConfig:
    """One best row, or one seed.

    Attributes:
        kernel_name, backend: the kernel.
        key: the bucket it was tuned for.
        params: the config's fields.
        family, device_fingerprint, device_name: of the device it was tuned on; the latter two are
            "" for a seed.
        source_sha256, toolchain_class: of the kernel as tuned; "" for a seed.
        median_ns, default_ns: measured time of this config and of the default; 0 for a seed.
        origin: ``"tuned"``, ``"seed"``, ``"import"`` or ``"transfer"``.
        policy: how it was timed, e.g. ``"eager_cold"``; "" for a seed.
    """

    kernel_name: str
    backend: str
    key: ProblemKey
    params: dict[str, int | bool | str]
    family: str
    device_fingerprint: str = ""
    device_name: str = ""
    source_sha256: str = ""
    toolchain_class: str = ""
    median_ns: int = 0
    default_ns: int = 0
    origin: str = "seed"
    policy: str = ""

    @property
    def is_default(self) -> bool:
        """Nothing beat the kernel's default, which may depend on the exact shape."""
        return 0 < self.median_ns == self.default_ns


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """What a database held.

    Attributes:
        state: ``"ok"``, ``"off"``, ``"missing"``, ``"locked"``, ``"newer"``, ``"unreadable"``,
            ``"unreachable"``.
        detail: why, for people; "" when ok.
        rows: the valid rows.
        invalid_rows: how many were skipped.
    """

    state: str
    detail: str = ""
    rows: tuple[StoredConfig, ...] = ()
    invalid_rows: int = 0


def parse_params(text: str) -> dict[str, int | bool | str]:
    """A stored config from its JSON text.

    Raises:
        ValueError: not a small flat JSON object of int, bool and str.
    """
    if len(text) >= MAX_JSON_CHARS:
        raise ValueError(
            f"config has {len(text)} characters; at most {MAX_JSON_CHARS - 1} are allowed"
        )
    return check_params(json.loads(text))


def check_params(values: object) -> dict[str, int | bool | str]:
    """The value itself, if it is a flat object of int, bool and str that may be a config.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(values, dict) or len(values) > 64:
        raise ValueError("config is not an object of at most 64 fields")
    for name, value in values.items():
        if not isinstance(name, str) or type(value) not in (int, bool, str):
            raise ValueError(f"config field {str(name)[:64]!r} is not an int, bool or str")
        if type(value) is int and abs(value) >= 2**62:
            raise ValueError(f"config field {name[:64]!r} is out of range")
    return values


def key_from_values(values: Sequence[Any]) -> ProblemKey:
    """A ProblemKey from column values in its order; SQLite's 0 and 1 become booleans.

    Raises:
        ValueError: a value has the wrong type.
    """
    checked: list[Any] = []
    for (name, kind), value in zip(_KEY_FIELDS, values, strict=True):
        if kind == "bool" and type(value) in (int, bool) and value in (0, 1):
            checked.append(bool(value))
        elif (kind == "int" and type(value) is int) or (kind == "str" and type(value) is str):
            checked.append(value)
        else:
            raise ValueError(f"problem column {name} is not {kind}")
    return ProblemKey(*checked)


def _row(values: Sequence[Any]) -> StoredConfig:
    head, key = values[: len(_HEAD_COLUMNS)], values[len(_HEAD_COLUMNS) :]
    kernel_name, backend, toolchain, median_ns, default_ns, *texts = head
    if not all(type(text) is str for text in (kernel_name, backend, toolchain, *texts)):
        raise ValueError("a text column holds something else")
    if not all(type(time_ns) is int and time_ns > 0 for time_ns in (median_ns, default_ns)):
        raise ValueError("a time is not a positive integer")
    origin, fingerprint, family, device_name, source, params, policy = texts
    return StoredConfig(
        kernel_name=kernel_name,
        backend=backend,
        key=key_from_values(key),
        params=parse_params(params),
        family=family,
        device_fingerprint=fingerprint,
        device_name=device_name,
        source_sha256=source,
        toolchain_class=toolchain,
        median_ns=median_ns,
        default_ns=default_ns,
        origin=origin,
        policy=policy,
    )


def rows_from(raw: Iterable[Sequence[Any]]) -> tuple[tuple[StoredConfig, ...], int]:
    """The rows that these values make, in the order of `COLUMNS`, and how many do not make one."""
    rows: list[StoredConfig] = []
    invalid = 0
    for values in raw:
        try:
            rows.append(_row(values))
        except (ValueError, RecursionError):
            invalid += 1
    return tuple(rows), invalid


def _newer(versions: Sequence[Any]) -> Snapshot | None:
    if len(versions) == 1 and versions[0] in REVISIONS:
        return None
    return Snapshot(
        "newer", f"its schema is {str(versions)[:80]}, this portattn knows up to {REVISIONS[-1]}"
    )


def connect_read_only(path: Path) -> sqlite3.Connection:
    """A connection to a file that is there, also where nobody may write.

    Raises:
        sqlite3.Error: it cannot be opened or read, or is locked for too long.
    """
    uri = f"file:{urllib.parse.quote(str(path))}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        wal = path.with_name(path.name + "-wal")
        refused = "unable to open" in str(error) or "readonly" in str(error)
        if not refused or wal.exists():
            raise
        # WAL needs files beside the database, which a read-only folder refuses; nobody writes
        # there either.
        connection = sqlite3.connect(uri + "&immutable=1", uri=True, timeout=BUSY_SECONDS)
    return connection


def _read_sqlite(path: Path) -> Snapshot:
    if not path.exists():
        return Snapshot("missing", "there is no such file")
    deadline = time.monotonic() + READ_SECONDS
    connection = connect_read_only(path)
    try:
        # A file from elsewhere may hold a view that never ends.
        connection.set_progress_handler(
            lambda: time.monotonic() > deadline, _INSTRUCTIONS_PER_CHECK
        )
        connection.execute("PRAGMA trusted_schema=OFF")
        newer = _newer([values[0] for values in connection.execute(_VERSION_SQL).fetchmany(2)])
        if newer is not None:
            return newer
        return Snapshot("ok", "", *rows_from(connection.execute(_READ_SQL)))
    finally:
        connection.close()


def _read_other(url: str) -> Snapshot:
    import sqlalchemy

    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        newer = _newer(
            [values[0] for values in connection.exec_driver_sql(_VERSION_SQL).fetchmany(2)]
        )
        if newer is not None:
            return newer
        return Snapshot("ok", "", *rows_from(connection.exec_driver_sql(_READ_SQL)))


def read(location: Location) -> Snapshot:
    """Every valid best row of the database; whatever is wrong with it becomes a state.

    Args:
        location: which database.
    """
    if not location.url:
        return Snapshot("off", "PORTATTN_DB is none")
    try:
        if location.is_http:
            from portattn.tuning_db import http_snapshot

            return http_snapshot.read(location.url)
        return (
            _read_sqlite(location.path) if location.path is not None else _read_other(location.url)
        )
    except (
        Exception
    ) as error:  # corrupt files also raise UnicodeDecodeError, KeyError, MemoryError ...
        text = f"{type(error).__name__}: {str(error)[:300]}"
        locked = "locked" in str(error) or "busy" in str(error)
        return Snapshot("locked" if locked else "unreadable", text)
