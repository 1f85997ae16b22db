"""Single rows: found or added by what identifies them. For `store`, `jobs` and `exchange`.

A transaction that adds several rows does so in one order (table by table, sorted within one), so
that two of them never wait for each other.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy.dialects import postgresql, sqlite

from portattn.tuning_db import schema
from portattn.tuning_db.identity import canonical_json, device_columns, sha256, toolchain
from portattn.tuning_db.records import Measurement, Timing
from portattn.tuning_db.snapshot import parse_params

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.tuning_db.key import ProblemKey
    from portattn.tuning_db.records import KernelResult, Params, Subject

SPACE_VERSION = 1
_MAX_ERROR_CHARS = 2048
_TIMING = tuple(field.name for field in dataclasses.fields(Timing))


def now_us() -> int:
    """The time, UTC, in microseconds."""
    return time.time_ns() // 1000


def storable(text: str) -> str:
    """A text that every database takes, at most 2048 characters: a crash prints what it likes."""
    text = text[:_MAX_ERROR_CHARS].replace("\0", "\ufffd")  # PostgreSQL has no NUL
    return text.encode("utf-8", "replace").decode()


def dialect_insert(
    connection: sqlalchemy.Connection, table: sqlalchemy.Table
) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that knows ON CONFLICT, which SQLAlchemy has per dialect only."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def has_written(
    connection: sqlalchemy.Connection, insert: postgresql.Insert | sqlite.Insert
) -> bool:
    """Run an INSERT with ON CONFLICT: whether it added or changed a row.

    Not by `rowcount`, which is -1 where SQLAlchemy itself asks for the new key.
    """
    return connection.execute(insert.returning(sqlalchemy.literal(1))).first() is not None


def get_or_add(
    connection: sqlalchemy.Connection,
    table: sqlalchemy.Table,
    unique: Sequence[str],
    values: Mapping[str, Any],
) -> int:
    """The id of the row with these unique columns, added if it is not there."""
    query = sqlalchemy.select(table.c.id).where(
        *(table.c[name] == values[name] for name in unique)
    )
    found = connection.execute(query).scalar_one_or_none()
    if found is None:
        insert = dialect_insert(connection, table).values(values)
        connection.execute(insert.on_conflict_do_nothing(index_elements=list(unique)))
        found = connection.execute(query).scalar_one()
    return int(found)


def problem_id(connection: sqlalchemy.Connection, key: ProblemKey) -> int:
    """The id of a bucket."""
    columns = dataclasses.asdict(key)
    values = {"key_sha256": sha256(columns), **columns}
    return get_or_add(connection, schema.problem, ["key_sha256"], values)


def subject_ids(connection: sqlalchemy.Connection, subject: Subject) -> dict[str, Any]:
    """What a measurement's columns say of its subject, and ``kernel_id``."""
    tools = toolchain()
    identity = {
        "name": subject.kernel_name,
        "backend": subject.backend,
        "source_sha256": subject.source_sha256,
        "space_sha256": subject.space_sha256,
    }
    shape = canonical_json(subject.shape)
    return {
        "device_id": get_or_add(
            connection, schema.device, ["fp_sha256"], device_columns(subject.device)
        ),
        "toolchain_id": get_or_add(
            connection, schema.toolchain, ["fp_sha256"], {"fp_sha256": sha256(tools), **tools}
        ),
        "kernel_id": get_or_add(
            connection, schema.kernel, list(identity), {**identity, "space_version": SPACE_VERSION}
        ),
        "problem_id": problem_id(connection, subject.key),
        "shape_json": shape,
        "shape_sha256": sha256(subject.shape),
        "policy": subject.policy,
    }


def config_id(connection: sqlalchemy.Connection, kernel_id: int, params: Params) -> int:
    """The id of a kernel's config."""
    values = {
        "kernel_id": kernel_id,
        "params_json": canonical_json(params),
        "params_sha256": sha256(params),
    }
    return get_or_add(connection, schema.config, ["kernel_id", "params_sha256"], values)


def add_measurement(
    connection: sqlalchemy.Connection, common: Mapping[str, Any], measured: Measurement
) -> int:
    """Append one measurement; its id.

    Args:
        connection: inside a transaction.
        common: of `subject_ids`, and ``run_id``.
        measured: what was found.
    """
    values = {name: value for name, value in common.items() if name != "kernel_id"}
    values |= _measurement_columns(measured)
    values["config_id"] = config_id(connection, common["kernel_id"], measured.params)
    insert = schema.measurement.insert().values(values).returning(schema.measurement.c.id)
    return int(connection.execute(insert).scalar_one())


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
        "error_text": storable(measured.error),
        "created_us": now_us(),
    }


def measurement_of(row: sqlalchemy.RowMapping) -> Measurement | None:
    """A row of table ``measurement`` with its config; None if it makes no sense."""
    try:
        params = parse_params(row["params_json"])
    except (ValueError, RecursionError):
        return None
    times = [row[name] for name in _TIMING]
    is_timed = all(type(value) is int and value >= 0 for value in times) and times[0] > 0
    if row["status"] not in schema.STATUSES or (row["status"] == "ok") != is_timed:
        return None
    return Measurement(
        params=params,
        round=row["round"],
        status=row["status"],
        timing=Timing(*times) if is_timed else None,
        default_ns=row["ref_median_ns"],
        max_abs_err=row["max_abs_err"],
        max_rel_err=row["max_rel_err"],
        compile_ns=row["compile_ns"],
        error=row["error_text"],
    )


def upsert_best(
    connection: sqlalchemy.Connection, result: KernelResult, ids: Mapping[str, Any]
) -> None:
    """Store a winner, if it is still the answer to what is stored.

    Args:
        connection: inside the transaction of its evidence.
        result: with a best.
        ids: device_id, problem_id, policy, config_id and measurement_id.
    """
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
        "confirm_median_ns": result.confirmed_ns,
        "confirm_default_ns": result.confirmed_default_ns,
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
