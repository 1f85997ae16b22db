"""Work for a fleet: jobs that workers take by leases.

A lease ends unless it is renewed; the job then goes to whoever asks next, with a higher fence, and
the run that belongs to it is taken away from the worker before (`runs.take_away`): one that only
slept finds each of its writes refused. PostgreSQL's workers skip the rows that others are taking;
on SQLite they take turns.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import sqlalchemy

from portattn.errors import TuningError
from portattn.tuning_db import rows, runs, schema
from portattn.tuning_db.identity import canonical_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.tuning_db.key import ProblemKey
    from portattn.tuning_db.store import Store

# A worker that is killed is replaced after at most this long.
LEASE_SECONDS = 40.0
# A job whose workers die again and again kills them.
MAX_ATTEMPTS = 4


class LostLeaseError(TuningError):
    """The job belongs to another worker by now."""

    def __init__(self, lease: Lease) -> None:
        super().__init__(
            f"the lease of job {lease.job_id} ran out and another worker has it, so that nothing "
            "more is stored of it here; what was stored before stays"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    """One job in the hands of one worker.

    Attributes:
        job_id, fence: which job, and which time it was given away.
        family: of the devices that may do it.
        kernel: to tune; "" for every one.
        case_json, options_json: the problem, and how it is to be tuned, as stored: to be checked.
        attempts: how often it was given away, this time included.
    """

    job_id: int
    fence: int
    family: str
    kernel: str
    case_json: str
    options_json: str
    attempts: int


def _now(connection: sqlalchemy.Connection) -> int:
    """The database's time in us: workers of several machines have several clocks."""
    if connection.dialect.name == "postgresql":
        text = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
        return int(connection.exec_driver_sql(text).scalar_one())
    return rows.now_us()


def enqueue(
    store: Store,
    family: str,
    key: ProblemKey,
    case: Mapping[str, Any],
    *,
    kernel: str = "",
    priority: int = 0,
    options: Mapping[str, Any] | None = None,
) -> bool:
    """Ask the fleet to tune a problem; one that is finished is queued again.

    Args:
        store: where to.
        family: of the devices (`DeviceKey.family`).
        key: the problem's bucket: there is one job a family, kernel and bucket.
        case: the problem itself, as plain values.
        kernel: to tune; "" for every one.
        priority: larger ones go first.
        options: how to tune it: budget_seconds, most, seed.

    Returns:
        Whether it is new work: False if it waits or is being done already.

    Raises:
        TuningError: the case is too large, or the database cannot be used.
    """
    case_json = canonical_json(dict(case))
    if len(case_json) >= schema.MAX_CASE_CHARS:
        raise TuningError(
            f"the problem {key.label} has {len(case_json)} characters of mask data; a job holds "
            f"{schema.MAX_CASE_CHARS}. Tune it without --enqueue"
        )
    job = schema.job
    with store.transaction() as connection:
        now = _now(connection)
        news = {
            "case_json": case_json,
            "options_json": canonical_json(dict(options or {})),
            "priority": priority,
            "state": "queued",
            "attempts": 0,
            "run_id": None,
            "error_text": "",
            "updated_us": now,
        }
        identity = {
            "device_family": family,
            "kernel": kernel,
            "problem_id": rows.problem_id(connection, key),
        }
        blank = {"lease_owner": "", "lease_until_us": 0, "fence": 0, "created_us": now}
        insert = rows.dialect_insert(connection, job).values({**identity, **blank, **news})
        statement = insert.on_conflict_do_update(
            index_elements=list(identity),
            set_=news,
            where=job.c.state.in_(("done", "failed")),
        )
        return rows.has_written(connection, statement)


def take(
    store: Store, families: Sequence[str], owner: str, *, seconds: float = LEASE_SECONDS
) -> Lease | None:
    """The next job for some kinds of devices: of the highest priority, the oldest.

    Args:
        store: where from.
        families: of the worker's devices.
        owner: for people: who has it.
        seconds: the lease ends after these, unless it is renewed.

    Returns:
        None if nothing waits.
    """
    job = schema.job
    while True:
        with store.transaction() as connection:
            now = _now(connection)
            is_free = sqlalchemy.or_(
                job.c.state == "queued",
                sqlalchemy.and_(job.c.state == "leased", job.c.lease_until_us < now),
            )
            query = (
                sqlalchemy.select(job)
                .where(job.c.device_family.in_(families), is_free)
                .order_by(job.c.priority.desc(), job.c.id)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            row = connection.execute(query).mappings().one_or_none()
            if row is None:
                return None
            if row["run_id"] is not None:
                runs.take_away(connection, row["run_id"])
            change = job.update().where(job.c.id == row["id"])
            fence, attempts = row["fence"] + 1, row["attempts"] + 1
            if attempts > MAX_ATTEMPTS:
                text = f"given up: {MAX_ATTEMPTS} workers died of it or lost it"
                connection.execute(
                    change.values(state="failed", error_text=text, fence=fence, updated_us=now)
                )
                continue
            connection.execute(
                change.values(
                    state="leased",
                    lease_owner=owner[:128],
                    lease_until_us=now + int(1e6 * seconds),
                    fence=fence,
                    attempts=attempts,
                    updated_us=now,
                )
            )
            return Lease(
                row["id"],
                fence,
                row["device_family"],
                row["kernel"],
                row["case_json"],
                row["options_json"],
                attempts,
            )


def _change(connection: sqlalchemy.Connection, lease: Lease, **values: str | int | None) -> None:
    job = schema.job
    change = job.update().where(
        job.c.id == lease.job_id, job.c.fence == lease.fence, job.c.state == "leased"
    )
    values["updated_us"] = _now(connection)
    if not connection.execute(change.values(values)).rowcount:
        raise LostLeaseError(lease)


def hold(connection: sqlalchemy.Connection, lease: Lease) -> None:
    """Keep others from taking a job until the transaction's end.

    Raises:
        LostLeaseError: another worker has it.
    """
    _change(connection, lease)


def attach(connection: sqlalchemy.Connection, lease: Lease, run_id: str) -> None:
    """Bind a run to a job, in the transaction that begins or continues the run.

    Raises:
        LostLeaseError: another worker has it.
    """
    _change(connection, lease, run_id=run_id)


def renew(store: Store, lease: Lease, *, seconds: float = LEASE_SECONDS) -> None:
    """Keep a job for some more seconds.

    Raises:
        LostLeaseError: another worker has it.
    """
    with store.transaction() as connection:
        _change(connection, lease, lease_until_us=_now(connection) + int(1e6 * seconds))


def finish(store: Store, lease: Lease, state: str, error: str = "") -> None:
    """Give a job back.

    Args:
        store: of the job.
        lease: held.
        state: ``"done"``; ``"failed"``; ``"queued"`` for another worker to go on with.
        error: why it failed.

    Raises:
        LostLeaseError: another worker has it.
    """
    values: dict[str, str | int | None] = {"state": state, "lease_until_us": 0}
    values["error_text"] = rows.storable(error)
    if state == "queued" and not error:
        values["attempts"] = lease.attempts - 1  # a worker that was asked to stop
    with store.transaction() as connection:
        _change(connection, lease, **values)


def counts(store: Store) -> dict[str, int]:
    """How many jobs are in each state."""
    query = sqlalchemy.select(schema.job.c.state, sqlalchemy.func.count())
    with store.transaction() as connection:
        found = connection.execute(query.group_by(schema.job.c.state)).all()
    return {state: 0 for state in schema.JOB_STATES} | {state: count for state, count in found}
