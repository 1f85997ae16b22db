"""Writes to the tuning database.

One `record` is one transaction: evidence and verdict, or neither.
"""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import sys
import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from portattn.tuning_db import schema
from portattn.tuning_db.engine import BUSY_SECONDS, open_engine, unusable
from portattn.tuning_db.identity import canonical_json, device_columns, sha256, toolchain
from portattn.tuning_db.location import locate
from portattn.tuning_db.records import Incumbent, KernelResult, Measurement, ProblemResult
from portattn.tuning_db.snapshot import parse_params

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from portattn.device import DeviceKey
    from portattn.tuning_db.key import ProblemKey

SPACE_VERSION = 1
_MAX_ERROR_CHARS = 2048


def now_us() -> int:
    """The time, UTC, in microseconds."""
    return time.time_ns() // 1000


class Store:
    """One open tuning database.

    Safe in several processes at once; one object serves one thread at a time.

    Args:
        database: an SQLAlchemy URL or SQLite file; None takes ``PORTATTN_DB`` or the default file.
        busy_seconds: how long to wait for another process's lock.

    Raises:
        TuningError: the database cannot be opened, written or migrated, or is newer than this
            version.
    """

    def __init__(
        self, database: str | os.PathLike[str] | None = None, *, busy_seconds: float = BUSY_SECONDS
    ) -> None:
        self.location = locate(database)
        self.engine = open_engine(self.location, busy_seconds=busy_seconds)

    @contextmanager
    def transaction(self) -> Iterator[sqlalchemy.Connection]:
        """A connection inside one transaction: committed at the end, or not at all.

        Raises:
            TuningError: the database stayed locked, or is damaged, full or read-only.
        """
        try:
            with self.engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise unusable(self.location, error) from error

    def begin_run(self, *, effort: str, seed: int, budget: Mapping[str, Any]) -> str:
        """Note a tuning run and return its id, a UUID."""
        run_id = str(uuid.uuid4())
        started = now_us()
        values = {
            "id": run_id,
            "host": socket.gethostname()[:256],
            "pid": os.getpid(),
            "started_us": started,
            "heartbeat_us": started,
            "effort": effort,
            "seed": seed,
            "budget_json": canonical_json(dict(budget)),
            "git_sha": "",
            "argv_sha256": sha256(sys.argv),
            "state": "running",
        }
        with self.transaction() as connection:
            connection.execute(schema.run.insert().values(values))
        return run_id

    def finish_run(self, run_id: str, state: str) -> None:
        """Note how a run ended: ``"done"``, ``"partial"`` or ``"failed"``."""
        with self.transaction() as connection:
            change = schema.run.update().where(schema.run.c.id == run_id)
            connection.execute(change.values(state=state, heartbeat_us=now_us()))

    def record(self, run_id: str, result: ProblemResult) -> None:
        """Store every measurement of a problem, and its best configs, in one transaction.

        Measurements are only ever added. A best row is replaced if it is still the one that the
        winner was measured against (`KernelResult.expected_rev`), else only by a smaller median:
        two tuners at once keep the faster config.
        """
        with self.transaction() as connection:
            common = {
                "device_id": _get_or_add(
                    connection, schema.device, ["fp_sha256"], device_columns(result.device)
                ),
                "problem_id": _problem_id(connection, result.key),
                "policy": result.policy,
            }
            tools = toolchain()
            tools_id = _get_or_add(
                connection, schema.toolchain, ["fp_sha256"], {"fp_sha256": sha256(tools), **tools}
            )
            evidence = {
                "toolchain_id": tools_id,
                "run_id": run_id,
                "shape_json": canonical_json(result.shape),
            }
            for kernel in result.kernels:
                _record_kernel(connection, kernel, common, evidence)
            heartbeat = schema.run.update().where(schema.run.c.id == run_id)
            connection.execute(heartbeat.values(heartbeat_us=now_us()))

    def incumbent(
        self,
        device: DeviceKey,
        key: ProblemKey,
        kernel_name: str,
        toolchain_class: str,
        policy: str,
    ) -> Incumbent | None:
        """The stored best config of a kernel for a bucket, whatever its source was.

        None if there is none.
        """
        best = schema.best
        query = (
            sqlalchemy.select(schema.config.c.params_json, best.c.rev)
            .join_from(best, schema.config, schema.config.c.id == best.c.config_id)
            .join(schema.device, schema.device.c.id == best.c.device_id)
            .join(schema.problem, schema.problem.c.id == best.c.problem_id)
            .where(
                schema.device.c.fp_sha256 == device.fingerprint,
                schema.problem.c.key_sha256 == sha256(dataclasses.asdict(key)),
                best.c.kernel_name == kernel_name,
                best.c.toolchain_class == toolchain_class,
                best.c.policy == policy,
            )
        )
        with self.transaction() as connection:
            row = connection.execute(query).one_or_none()
        try:
            return Incumbent(parse_params(row.params_json), row.rev) if row is not None else None
        except ValueError:
            return None  # a damaged row is no candidate; what is measured now replaces it


def dialect_insert(
    connection: sqlalchemy.Connection, table: sqlalchemy.Table
) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that knows ON CONFLICT, which SQLAlchemy has per dialect only."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def _get_or_add(
    connection: sqlalchemy.Connection,
    table: sqlalchemy.Table,
    unique: list[str],
    values: Mapping[str, Any],
) -> int:
    """The id of the row with these unique columns, added if it is not there."""
    connection.execute(
        dialect_insert(connection, table)
        .values(values)
        .on_conflict_do_nothing(index_elements=unique)
    )
    query = sqlalchemy.select(table.c.id).where(
        *(table.c[name] == values[name] for name in unique)
    )
    return int(connection.execute(query).scalar_one())


def _problem_id(connection: sqlalchemy.Connection, key: ProblemKey) -> int:
    columns = dataclasses.asdict(key)
    return _get_or_add(
        connection, schema.problem, ["key_sha256"], {"key_sha256": sha256(columns), **columns}
    )


def _record_kernel(
    connection: sqlalchemy.Connection,
    result: KernelResult,
    common: Mapping[str, Any],
    evidence: Mapping[str, Any],
) -> None:
    identity = {
        "name": result.kernel_name,
        "backend": result.backend,
        "source_sha256": result.source_sha256,
        "space_sha256": result.space_sha256,
    }
    kernel_id = _get_or_add(
        connection, schema.kernel, list(identity), {**identity, "space_version": SPACE_VERSION}
    )
    for measured in result.measurements:
        config_id = _config_id(connection, kernel_id, measured)
        row = {**common, **evidence, "config_id": config_id, **_measurement_columns(measured)}
        added = connection.execute(schema.measurement.insert().values(row)).inserted_primary_key
        if measured is result.best and added is not None:
            _upsert_best(
                connection, result, {**common, "config_id": config_id, "measurement_id": added[0]}
            )


def _config_id(connection: sqlalchemy.Connection, kernel_id: int, measured: Measurement) -> int:
    values = {
        "kernel_id": kernel_id,
        "params_json": canonical_json(measured.params),
        "params_sha256": sha256(measured.params),
    }
    return _get_or_add(connection, schema.config, ["kernel_id", "params_sha256"], values)


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity; the status and the error text tell those."""
    return value if value is not None and math.isfinite(value) else None


def _measurement_columns(measured: Measurement) -> dict[str, Any]:
    timing = dataclasses.asdict(measured.timing) if measured.timing is not None else {}
    return {
        "round": measured.round,
        "status": measured.status,
        **timing,
        "ref_median_ns": measured.default_ns,
        "max_abs_err": _finite(measured.max_abs_err),
        "max_rel_err": _finite(measured.max_rel_err),
        "compile_ns": measured.compile_ns,
        "error_text": measured.error[:_MAX_ERROR_CHARS],
        "created_us": now_us(),
    }


def _upsert_best(
    connection: sqlalchemy.Connection, result: KernelResult, ids: Mapping[str, Any]
) -> None:
    assert result.best is not None
    timing, default_ns = result.best.timing, result.best.default_ns
    assert timing is not None
    assert default_ns is not None
    best = schema.best
    values = {
        **ids,
        "toolchain_class": result.toolchain_class,
        "kernel_name": result.kernel_name,
        "backend": result.backend,
        "median_ns": timing.median_ns,
        "default_ns": default_ns,
        "gain": default_ns / timing.median_ns,
        "ci95_lo": timing.ci95_lo_ns,
        "ci95_hi": timing.ci95_hi_ns,
        "verified_seeds": result.verified_seeds,
        "verified_rule": result.verified_rule,
        "source": "tuned",
        "updated_us": now_us(),
    }
    insert = dialect_insert(connection, best).values({**values, "rev": 1})
    keep = {name for name in values if name not in {column.name for column in best.primary_key}}
    replace = {name: insert.excluded[name] for name in keep}
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=[column.name for column in best.primary_key],
            set_={**replace, "rev": best.c.rev + 1},
            where=sqlalchemy.or_(
                best.c.rev == result.expected_rev, best.c.median_ns > insert.excluded.median_ns
            ),
        )
    )
