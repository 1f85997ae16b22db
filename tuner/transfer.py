"""How good a config is where it was not tuned: what a call gets for a shape that nobody measured.

One after the other each recorded problem is taken out; the others' best configs stand for a
database. The call then gets that of the nearest bucket, by the rule of
`portattn.tuning_db.lookup`, or the kernel's default where none is near.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from portattn.errors import TuningError
from portattn.tuner import cases
from portattn.tuning_db.key import MAX_DISTANCE, bucket, distance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.backends.base import ConfigValue
    from portattn.tuner.oracle import Table
    from portattn.tuning_db.key import ProblemKey


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """What one problem got.

    Attributes:
        kernel, problem: the table that was taken out.
        source: the problem whose best config runs; "" for the default.
        apart: how far its bucket is, in doublings; inf for the default.
        fraction: the problem's optimum over the time of what runs; 0 if that fails there.
        default_fraction: the same of the default.
    """

    kernel: str
    problem: str
    source: str
    apart: float
    fraction: float
    default_fraction: float


def leave_one_out(tables: Sequence[Table], *, most: float = MAX_DISTANCE) -> list[Transfer]:
    """Take out each table whose problem is written in words.

    Args:
        tables: recorded.
        most: buckets further away are not used.
    """
    keys = {id(table): key for table in tables if (key := _key(table)) is not None}
    return [
        _taken_out(table, [one for one in tables if id(one) in keys], keys, most)
        for table in tables
        if id(table) in keys
    ]


def _key(table: Table) -> ProblemKey | None:
    """None for a problem that is a label."""
    try:
        return bucket(cases.parse(table.problem, "cuda:0").problem)
    except TuningError:
        return None


def _taken_out(
    table: Table, tables: Sequence[Table], keys: dict[int, ProblemKey], most: float
) -> Transfer:
    key = keys[id(table)]
    near: list[tuple[float, int, str, tuple[ConfigValue, ...]]] = []
    for other in tables:
        if other is table or other.kernel != table.kernel or keys[id(other)] == key:
            continue
        apart = distance(keys[id(other)], key)
        # As the tuner: the default stays unless another is faster by a percent.
        best = min(
            (time_ns, config) for config, time_ns in other.outcomes.items() if type(time_ns) is int
        )
        is_default = best[0] > 0.99 * int(other.outcomes[other.default])
        if apart <= most:
            config = table.default if is_default else best[1]
            near.append((apart, best[0], other.problem, config))
    apart, _, source, config = min(near, default=(math.inf, 0, "", table.default))
    # What is not feasible there is not used: the default runs.
    outcome = table.outcomes.get(config, table.outcomes[table.default])
    return Transfer(
        table.kernel,
        table.problem,
        source,
        apart,
        table.optimum_ns / outcome if isinstance(outcome, int) else 0.0,
        table.optimum_ns / int(table.outcomes[table.default]),
    )
