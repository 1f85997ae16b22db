"""The bounded cache of plans: least recently used out, by bytes."""

from __future__ import annotations

import collections
import os
import threading
from typing import TYPE_CHECKING, Protocol

from portattn.errors import ConfigError
from portattn.plan.plan import Plan

if TYPE_CHECKING:
    from portattn.masks import Mask

_DEFAULT_BYTES = 256 << 20
# The program of "everything": version 1, ALL.
_ALL = (1, 0)

_Key = tuple["Mask | None", int, int, int, int, int, int, int]


class KeptCall(Protocol):
    """What a backend keeps on a plan.

    Attributes:
        used: it ran; the cache resets it.
    """

    used: bool


class PlanCache:
    """Plans by (mask, sizes, q_offset, blocks). Thread-safe.

    A plan used in a CUDA graph capture is never dropped: the graph reads its device arrays.
    """

    def __init__(self, max_bytes: int) -> None:
        """Hold at most max_bytes of plan arrays (a single larger plan is held alone)."""
        self.max_bytes = max_bytes
        self._plans: collections.OrderedDict[_Key, Plan] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: _Key) -> Plan:
        """The plan of the key, made if it is not there."""
        with self._lock:
            found = self._plans.get(key)
            if found is not None:
                self._plans.move_to_end(key)
                return found
        made = _make(key)
        with self._lock:
            found = self._plans.setdefault(key, made)
            if found is made:
                self._bytes += made.nbytes
                self._evict(key)
        return found

    def _evict(self, newest: _Key) -> None:
        for _ in range(2 * len(self._plans)):
            if self._bytes <= self.max_bytes:
                return
            key, plan = next(iter(self._plans.items()))
            # Calls that were repeated did not ask the cache: such plans get a second chance.
            if _was_used(plan) or plan.captured or key == newest:
                self._plans.move_to_end(key)
            else:
                self._bytes -= self._plans.pop(key).nbytes

    def clear(self) -> None:
        """Drop all plans that no CUDA graph holds."""
        with self._lock:
            for key in list(self._plans):
                if not self._plans[key].captured:
                    self._bytes -= self._plans.pop(key).nbytes

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def nbytes(self) -> int:
        """Bytes of the plans held."""
        return self._bytes


def _was_used(plan: Plan) -> bool:
    """Whether a call of the plan ran since this was last asked."""
    calls = list(plan.calls.values())
    found = any(call.used for call in calls)
    for call in calls:
        call.used = False
    return found


def _make(key: _Key) -> Plan:
    mask, batch, num_heads, seqlen_q, seqlen_k, q_offset, block_q, block_k = key
    return Plan.create(
        _ALL if mask is None else mask.program,
        () if mask is None else mask.data,
        batch=batch,
        num_heads=num_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        q_offset=q_offset,
        block_q=block_q,
        block_k=block_k,
    )


def _bytes_from_environment() -> int:
    text = os.environ.get("PORTATTN_PLAN_CACHE_BYTES")
    if text is None:
        return _DEFAULT_BYTES
    if not text.isdigit():
        raise ConfigError(
            f"PORTATTN_PLAN_CACHE_BYTES is {text!r}; it must be a whole number of bytes, or unset"
        )
    return int(text)


cache = PlanCache(_bytes_from_environment())


def plan_mask(
    mask: Mask | None,
    *,
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int,
    block_q: int,
    block_k: int,
) -> Plan:
    """The plan of a mask for one call, from the cache or made now.

    Args:
        mask: what may attend; None keeps everything.
        batch, num_heads: of the call (query heads).
        seqlen_q, seqlen_k: lengths in tokens.
        q_offset: key position of query row 0.
        block_q, block_k: rows and keys of a tile.

    Raises:
        MaskError: the mask does not fit the call.
    """
    return cache.get((mask, batch, num_heads, seqlen_q, seqlen_k, q_offset, block_q, block_k))
