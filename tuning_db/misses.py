"""Which problems had no tuned config here: counted in the process, stored off the call path.

A call adds one tuple to a bounded list, once for a problem and not again when it is repeated. A
thread, or the end of the process, writes them into table ``miss``, from which `portattn tune
--missed` takes what to tune. Nothing here raises, makes a database, or waits for one for long.
SQLite files are written through the standard library (2 ms, against 150 ms for importing
SQLAlchemy).
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from portattn.tuning_db.identity import canonical_json, device_columns, sha256
from portattn.tuning_db.key import bucket
from portattn.tuning_db.snapshot import MAX_JSON_CHARS, REVISIONS

if TYPE_CHECKING:
    from pathlib import Path

    from portattn.device import DeviceKey
    from portattn.problem import AttentionProblem
    from portattn.tuning_db.key import ProblemKey
    from portattn.tuning_db.location import Location

ENVIRONMENT_VARIABLE = "PORTATTN_MISSES"
# Rungs on which a config stands that was not tuned on this device for this bucket.
ELSEWHERE = frozenset({"family", "seeds", "nearest"})
DEFAULT = "default"
MAX_PENDING = 1024
MAX_STORED = 4096
FLUSH_SECONDS = 30.0
# The thread waits so long for a locked database; the end of a process does not keep anybody.
_THREAD_BUSY_SECONDS, _EXIT_BUSY_SECONDS = 5.0, 0.25
_WRITE_SECONDS = 2.0
_INSTRUCTIONS_PER_CHECK = 20_000

# The same text for SQLite and PostgreSQL, and for the standard library and SQLAlchemy.
_VERSION_SQL = "SELECT version_num FROM portattn_version"
_MISS_SQL = (
    "INSERT INTO miss (device_id, problem_key_sha256, problem_json, count, first_us, last_us, "
    "served_from) SELECT id, :key, :problem, :count, :first_us, :last_us, :served_from "
    "FROM device WHERE fp_sha256 = :device ON CONFLICT (device_id, problem_key_sha256) "
    "DO UPDATE SET count = miss.count + excluded.count, last_us = excluded.last_us, "
    "problem_json = excluded.problem_json, served_from = excluded.served_from"
)
_TRIM_SQL = (
    "DELETE FROM miss WHERE last_us < "
    f"(SELECT last_us FROM miss ORDER BY last_us DESC LIMIT 1 OFFSET {MAX_STORED - 1})"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Miss:
    """One lookup that found no config tuned here.

    Attributes:
        location: of the database that was asked.
        problem, device: what was looked up.
        rung: where the config that ran was from: `DEFAULT`, or one of `ELSEWHERE`.
        at_us: when.
    """

    location: Location
    problem: AttentionProblem
    device: DeviceKey
    rung: str
    at_us: int


Execute = Callable[[str, Mapping[str, Any]], Any]

_pending: list[Miss] = []
_lock = threading.Lock()  # of who writes
_thread: threading.Thread | None = None
_is_registered = False


def are_wanted(location: Location) -> bool:
    """Whether misses are to be counted: in local files unless PORTATTN_MISSES is ``off``.

    On database servers, which many processes share, only if it is ``on``.
    """
    setting = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if setting == "off" or not location.url or location.is_http:
        return False
    return location.path is not None or setting == "on"


def note(location: Location, problem: AttentionProblem, device: DeviceKey, rung: str) -> None:
    """Count a miss; called once for each new problem of a process."""
    if len(_pending) >= MAX_PENDING:
        return  # bounded: what is dropped shows again in another process
    _pending.append(Miss(location, problem, device, rung, time.time_ns() // 1000))
    if _thread is None:
        _start()


def _start() -> None:
    global _is_registered, _thread
    if not _is_registered:
        _is_registered = True
        atexit.register(_at_exit)
        os.register_at_fork(after_in_child=_forget)
    thread = threading.Thread(target=_later, name="portattn-misses", daemon=True)
    with contextlib.suppress(RuntimeError):  # the interpreter ends, or no more threads
        thread.start()
        _thread = thread


def _later() -> None:
    global _thread
    time.sleep(FLUSH_SECONDS)
    _thread = None  # before the list is taken: a miss after that starts another thread
    flush(busy_seconds=_THREAD_BUSY_SECONDS)


def _at_exit() -> None:
    flush(busy_seconds=_EXIT_BUSY_SECONDS)


def _forget() -> None:
    """In a forked child: what is pending is the parent's, and so is the thread."""
    global _lock, _thread
    _pending.clear()
    _lock, _thread = threading.Lock(), None


def flush(*, busy_seconds: float = _THREAD_BUSY_SECONDS) -> int:
    """Store what was counted so far. Never raises.

    Args:
        busy_seconds: how long to wait for another process's lock.

    Returns:
        How many misses were stored; those of a database that cannot be written are dropped.
    """
    stored = 0
    if not _lock.acquire(timeout=busy_seconds):
        return 0
    try:
        taken = _pending[:]
        del _pending[: len(taken)]
        for location in dict.fromkeys(one.location for one in taken):
            mine = [one for one in taken if one.location == location]
            with contextlib.suppress(Exception):  # whatever a database may do to us
                stored += len(mine) if _write(location, rows_of(mine), busy_seconds) else 0
    finally:
        _lock.release()
    return stored


def rows_of(misses: Iterable[Miss]) -> list[dict[str, Any]]:
    """Misses merged by device and bucket, as parameters of the statements."""
    groups: dict[tuple[DeviceKey, ProblemKey], list[Miss]] = {}
    for one in misses:
        groups.setdefault((one.device, bucket(one.problem)), []).append(one)
    rows = []
    for (device, key), found in groups.items():
        last = found[-1]
        problem = dataclasses.asdict(last.problem)
        problem |= {
            "program": list(last.problem.program),
            "features": sorted(last.problem.features),
        }
        row: dict[str, Any] = {
            "key": sha256(dataclasses.asdict(key)),
            "problem": canonical_json(problem),
            "count": len(found),
            "first_us": found[0].at_us,
            "last_us": last.at_us,
            "served_from": last.rung,
            "device": device.fingerprint,
            "columns": device_columns(device),
        }
        if len(row["problem"]) < MAX_JSON_CHARS:
            rows.append(row)
    return sorted(rows, key=lambda row: (row["device"], row["key"]))  # one order for all writers


def _insert(execute: Execute, rows: Iterable[dict[str, Any]]) -> None:
    """The statements, through whatever executes them."""
    for row in rows:
        columns = row["columns"]
        names, values = ", ".join(columns), ", ".join(f":{name}" for name in columns)
        execute(
            f"INSERT INTO device ({names}) VALUES ({values}) ON CONFLICT (fp_sha256) DO NOTHING",
            columns,
        )
        execute(_MISS_SQL, {name: value for name, value in row.items() if name != "columns"})
    execute(_TRIM_SQL, {})


def _write(location: Location, rows: list[dict[str, Any]], busy_seconds: float) -> bool:
    """Whether there is a database of a known schema, which has them now."""
    if location.path is None:
        return _write_server(location, rows, busy_seconds)
    return location.path.exists() and _write_file(location.path, rows, busy_seconds)


def _is_known(versions: list[Any]) -> bool:
    return len(versions) == 1 and versions[0] in REVISIONS


def _write_file(path: Path, rows: list[dict[str, Any]], busy_seconds: float) -> bool:
    uri = f"file:{urllib.parse.quote(str(path))}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=busy_seconds, isolation_level=None)
    deadline = time.monotonic() + busy_seconds + _WRITE_SECONDS
    try:
        # A file from elsewhere may hold a trigger that never ends.
        connection.set_progress_handler(
            lambda: time.monotonic() > deadline, _INSTRUCTIONS_PER_CHECK
        )
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("BEGIN IMMEDIATE")
        if not _is_known([row[0] for row in connection.execute(_VERSION_SQL).fetchmany(2)]):
            return False
        _insert(connection.execute, rows)
        connection.execute("COMMIT")
        return True
    finally:
        connection.close()  # rolls back what is not committed


def _write_server(location: Location, rows: list[dict[str, Any]], busy_seconds: float) -> bool:
    import sqlalchemy

    url = sqlalchemy.make_url(location.url)
    options: dict[str, Any] = {}
    if url.get_driver_name().startswith("psycopg"):
        options["connect_args"] = {"connect_timeout": max(2, int(busy_seconds))}
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, **options)
    with engine.begin() as connection:
        if not _is_known(list(connection.exec_driver_sql(_VERSION_SQL).scalars().fetchmany(2))):
            return False
        _insert(lambda sql, row: connection.execute(sqlalchemy.text(sql), row), rows)
    return True
