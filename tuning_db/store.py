"""Writes to the tuning database. Each call is one transaction: what it stores, or nothing.

A measurement is stored as soon as it is made (`Store.add`); a problem's finals and best configs
are stored together (`Store.record`).
"""

from __future__ import annotations

import dataclasses
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError

from portattn.tuning_db import jobs, rows, runs, schema
from portattn.tuning_db.engine import BUSY_SECONDS, open_engine, unusable
from portattn.tuning_db.identity import sha256, toolchain
from portattn.tuning_db.location import locate
from portattn.tuning_db.records import (
    Incumbent,
    KernelResult,
    Measurement,
    ProblemResult,
    Subject,
)
from portattn.tuning_db.rows import dialect_insert, now_us
from portattn.tuning_db.runs import LostRunError
from portattn.tuning_db.snapshot import parse_params

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from portattn.device import DeviceKey
    from portattn.tuning_db.key import ProblemKey

__all__ = ["LostRunError", "Store", "dialect_insert", "now_us"]


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
        # A server's connection is kept as long as this object.
        weakref.finalize(self, self.engine.dispose)
        self._fences: dict[str, int] = {}
        self._subjects: dict[str, dict[str, Any]] = {}

    @contextmanager
    def transaction(self) -> Iterator[sqlalchemy.Connection]:
        """A connection inside one transaction: committed at the end, or not at all.

        Raises:
            TuningError: the database stayed locked, or is damaged, full or read-only.
        """
        try:
            with self.engine.begin() as connection:
                yield connection
        # sqlite3 decodes messages about a damaged file, which hold its bytes.
        except (SQLAlchemyError, UnicodeError) as error:
            raise unusable(self.location, error) from error

    def begin_run(
        self,
        *,
        effort: str,
        seed: int,
        budget: Mapping[str, Any],
        work: object = None,
        resume: bool = True,
        lease: jobs.Lease | None = None,
    ) -> str:
        """Begin a tuning run, or continue one that its process did not finish.

        Args:
            effort, seed, budget: noted with a new run.
            work: a JSON value that says all that the run does; of unfinished runs whose process is
                gone, the newest with the same work is continued. None: nothing is.
            resume: False begins a new run in any case.
            lease: the job that the run is for; the run ends with it.

        Returns:
            The run's id, a UUID. A continued run keeps its own.

        Raises:
            LostLeaseError: another worker has the job.
        """
        values = runs.new_values(effort, seed, budget, work)
        with self.transaction() as connection:
            if lease is not None:
                jobs.hold(connection, lease)  # before the run's row, as `jobs.take` does
            run_id, fence = runs.begin(connection, values, resume=resume)
            if lease is not None:
                jobs.attach(connection, lease, run_id)
        self._fences[run_id] = fence
        return run_id

    def finish_run(self, run_id: str, state: str) -> None:
        """Note how a run ended: ``"done"``, ``"partial"`` or ``"failed"``.

        Raises:
            LostRunError: another process continues it.
        """
        with self.transaction() as connection:
            runs.check(connection, run_id, self._fences.get(run_id, 0), state=state)

    def add(self, run_id: str, subject: Subject, measured: Measurement) -> int:
        """Store one measurement: when this returns, nothing but the disk can lose it.

        Args:
            run_id: of `begin_run`.
            subject: what was measured.
            measured: the config, and what was found.

        Returns:
            Its row number.

        Raises:
            LostRunError: another process continues the run.
            TuningError: the run holds it already, or the database cannot be used.
        """
        with self.transaction() as connection:
            runs.check(connection, run_id, self._fences.get(run_id, 0))
            found = self._find(connection, subject)
            number = rows.add_measurement(connection, {"run_id": run_id, **found[1]}, measured)
        self._subjects.update([found])  # not before the rows are committed
        return number

    def _find(
        self, connection: sqlalchemy.Connection, subject: Subject
    ) -> tuple[str, dict[str, Any]]:
        """A subject's name, and the ids of its rows, which are added if need be."""
        name = sha256([subject.device.fingerprint, dataclasses.asdict(subject)])
        return name, self._subjects.get(name) or rows.subject_ids(connection, subject)

    def measured(self, run_id: str, subject: Subject) -> list[Measurement]:
        """What a run's searches measured of a subject so far, in order: what resuming skips.

        Rows that do not make sense are left out.
        """
        m, c, k = schema.measurement, schema.config, schema.kernel
        query = (
            sqlalchemy.select(m, c.c.params_json)
            .join_from(m, c, c.c.id == m.c.config_id)
            .join(k, k.c.id == c.c.kernel_id)
            .where(
                m.c.run_id == run_id,
                m.c.device_id == _id_of(schema.device, "fp_sha256", subject.device.fingerprint),
                m.c.toolchain_id == _id_of(schema.toolchain, "fp_sha256", sha256(toolchain())),
                m.c.problem_id == _id_of(schema.problem, "key_sha256", _key_sha(subject.key)),
                m.c.shape_sha256 == sha256(subject.shape),
                m.c.policy == subject.policy,
                m.c.round == 0,
                k.c.name == subject.kernel_name,
                k.c.backend == subject.backend,
                k.c.source_sha256 == subject.source_sha256,
                k.c.space_sha256 == subject.space_sha256,
            )
            .order_by(m.c.id)
        )
        with self.transaction() as connection:
            found = connection.execute(query).mappings().all()
        measurements = (rows.measurement_of(row) for row in found)
        return [one for one in measurements if one is not None]

    def decided(
        self, run_id: str, key: ProblemKey, shape: Mapping[str, int | str], policy: str
    ) -> bool:
        """Whether a run stored the finals of a problem: then it has nothing more to do there."""
        m = schema.measurement
        query = sqlalchemy.select(m.c.id).where(
            m.c.run_id == run_id,
            m.c.problem_id == _id_of(schema.problem, "key_sha256", _key_sha(key)),
            m.c.shape_sha256 == sha256(dict(shape)),
            m.c.policy == policy,
            m.c.round > 0,
        )
        with self.transaction() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def record(self, run_id: str, result: ProblemResult) -> None:
        """Store the measurements of a result, and its best configs, in one transaction.

        Measurements are only ever added. A best row is replaced if it is still the one that the
        winner was measured against (`KernelResult.expected_rev`), else only by a smaller median:
        two tuners at once keep the faster config.

        Raises:
            LostRunError: another process continues the run.
            TuningError: the run holds one of them already, or the database cannot be used.
        """
        with self.transaction() as connection:
            runs.check(connection, run_id, self._fences.get(run_id, 0))
            found = [
                self._record_kernel(connection, run_id, result, kernel)
                for kernel in sorted(result.kernels, key=lambda one: one.kernel_name)
            ]
        self._subjects.update(found)

    def _record_kernel(
        self,
        connection: sqlalchemy.Connection,
        run_id: str,
        result: ProblemResult,
        kernel: KernelResult,
    ) -> tuple[str, dict[str, Any]]:
        """Add a kernel's measurements and its best row; as `_find`."""
        identity = (kernel.kernel_name, kernel.backend, kernel.source_sha256, kernel.space_sha256)
        subject = Subject(result.device, result.key, result.shape, result.policy, *identity)
        name, ids = self._find(connection, subject)
        for params in sorted((one.params for one in kernel.measurements), key=sha256):
            rows.config_id(connection, ids["kernel_id"], params)  # in the order that all keep
        for measured in kernel.measurements:
            number = rows.add_measurement(connection, {"run_id": run_id, **ids}, measured)
            if measured is kernel.best:
                evidence = {name: ids[name] for name in ("device_id", "problem_id", "policy")}
                evidence["config_id"] = rows.config_id(
                    connection, ids["kernel_id"], measured.params
                )
                rows.upsert_best(connection, kernel, {**evidence, "measurement_id": number})
        return name, ids

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
                schema.problem.c.key_sha256 == _key_sha(key),
                best.c.kernel_name == kernel_name,
                best.c.toolchain_class == toolchain_class,
                best.c.policy == policy,
            )
        )
        with self.transaction() as connection:
            row = connection.execute(query).one_or_none()
        try:
            return Incumbent(parse_params(row.params_json), row.rev) if row is not None else None
        except (ValueError, RecursionError):
            return None  # a damaged row is no candidate; what is measured now replaces it


def _key_sha(key: ProblemKey) -> str:
    return sha256(dataclasses.asdict(key))


def _id_of(table: sqlalchemy.Table, column: str, value: str) -> sqlalchemy.ScalarSelect[Any]:
    return sqlalchemy.select(table.c.id).where(table.c[column] == value).scalar_subquery()
