"""Rows by bucket, and the nearest bucket to one that has none: for `lookup`, on the call path."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from portattn.tuning_db.key import ProblemKey
    from portattn.tuning_db.snapshot import StoredConfig

_SAME = 1e-9  # doublings: rounding


def _log2(size: int) -> float:
    """0 counts as 1/2, as in `key.distance`."""
    return math.log2(max(size, 0.5))


def point(key: ProblemKey) -> tuple[float, ...]:
    """A bucket as a point: `key.distance` within a group is the sum of the differences."""
    return (
        _log2(key.sq_bucket),
        _log2(key.sk_bucket),
        _log2(key.batch_bucket * key.hq),
        _log2(key.hq) - _log2(key.hkv),
        _log2(key.window_bucket),
        _log2(key.block_size),
    )


class Group:
    """Rows of buckets between which there is a distance: of one kernel, family and group.

    Attributes:
        rows: bucket -> its rows.
    """

    def __init__(self) -> None:
        self.rows: dict[ProblemKey, list[StoredConfig]] = {}
        self._keys: list[ProblemKey] = []
        self._points: np.ndarray[tuple[int, int], np.dtype[np.float64]] | None = None
        self._measured: dict[str, Group] = {}

    def add(self, row: StoredConfig) -> None:
        """Add a row; not after the first question."""
        self.rows.setdefault(row.key, []).append(row)

    def near(self, key: ProblemKey, most: float) -> list[ProblemKey]:
        """The nearest buckets that have rows: several that are equally far, or none.

        Args:
            key: a bucket of the group; may have rows itself.
            most: further ones do not count.
        """
        if key in self.rows:
            return [key]
        if self._points is None:
            self._keys = list(self.rows)
            if not self._keys:
                return []
            self._points = np.array([point(one) for one in self._keys]).T.copy()
        # Ufuncs' own methods: arrays' spend longer in their wrappers than these do in all.
        apart = np.add.reduce(np.abs(self._points - np.array(point(key))[:, None]))
        least = float(np.minimum.reduce(apart))
        if least > most:
            return []
        return [self._keys[index] for index in (apart <= least + _SAME).nonzero()[0].tolist()]

    def measured_on(self, fingerprint: str) -> Group:
        """The rows that have a time on one device; "": seeds."""
        found = self._measured.get(fingerprint)
        if found is None:
            found = self._measured[fingerprint] = Group()
            for rows in self.rows.values():
                for row in rows:
                    if row.device_fingerprint == fingerprint and row.median_ns:
                        found.add(row)
        return found
