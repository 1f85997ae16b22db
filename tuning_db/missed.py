"""What `misses` stored, read back: problems that `portattn tune --missed` takes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import sqlalchemy

from portattn.tuning_db import schema

if TYPE_CHECKING:
    from collections.abc import Iterable

    from portattn.tuning_db.store import Store

MOST = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Missed:
    """A bucket that calls asked for and nobody has tuned on the device since.

    Attributes:
        key_sha256: of the bucket.
        problem_json: one of its problems, as stored: to be checked.
        count: how often a process met one.
        served_from: the rung of the config that ran.
        last_us: when it was asked for last.
    """

    key_sha256: str
    problem_json: str
    count: int
    served_from: str
    last_us: int


def missed(store: Store, device: str, *, min_count: int = 1, most: int = MOST) -> list[Missed]:
    """What was missed on a device and is not tuned there since, the most frequent first.

    Args:
        store: the database.
        device: its fingerprint, or the family of several devices, each of which counts.
        min_count: rarer ones are left out.
        most: how many.
    """
    m, best, problem = schema.miss, schema.best, schema.problem
    is_tuned = (
        sqlalchemy.select(best.c.device_id)
        .join(problem, problem.c.id == best.c.problem_id)
        .where(
            best.c.device_id == m.c.device_id,
            problem.c.key_sha256 == m.c.problem_key_sha256,
            best.c.updated_us >= m.c.last_us,
        )
        .exists()
    )
    query = (
        sqlalchemy.select(
            m.c.problem_key_sha256, m.c.problem_json, m.c.count, m.c.served_from, m.c.last_us
        )
        .join(schema.device, schema.device.c.id == m.c.device_id)
        .where(
            sqlalchemy.or_(schema.device.c.fp_sha256 == device, schema.device.c.family == device),
            m.c.count >= min_count,
            ~is_tuned,
        )
        .order_by(m.c.count.desc(), m.c.last_us.desc(), m.c.problem_key_sha256)
        .limit(most)
    )
    with store.transaction() as connection:
        return [Missed(*row) for row in connection.execute(query)]


def forget(store: Store, fingerprint: str, keys: Iterable[str]) -> int:
    """Delete misses of a device, by their buckets; how many there were."""
    m = schema.miss
    device = (
        sqlalchemy.select(schema.device.c.id)
        .where(schema.device.c.fp_sha256 == fingerprint)
        .scalar_subquery()
    )
    statement = m.delete().where(
        m.c.device_id == device, m.c.problem_key_sha256.in_(sorted(set(keys)))
    )
    with store.transaction() as connection:
        return int(connection.execute(statement).rowcount)
