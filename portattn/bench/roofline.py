"""The least time that a device could take: matrix products, exponentials, memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portattn.bench.limits import Limits
    from portattn.bench.workloads import Workload

_KEYS_PER_RESCALE = 128  # a row's running maximum costs two exponentials per tile of keys


@dataclasses.dataclass(frozen=True, slots=True)
class Roofline:
    """Lower bounds of one row, in milliseconds.

    Attributes:
        mma_ms: 4 * head_dim operations per kept pair at the measured matmul rate.
        exp_ms: 1 + 2 / 128 exponentials per kept pair; None where their rate is not known.
        hbm_ms: query, key, value and output moved once at the measured read rate.
    """

    mma_ms: float
    exp_ms: float | None
    hbm_ms: float

    @property
    def least_ms(self) -> float:
        """The largest of the three: no perfectly overlapped kernel is faster."""
        return max(self.mma_ms, self.exp_ms or 0.0, self.hbm_ms)

    @property
    def bound(self) -> str:
        """What bounds it: ``"mma"``, ``"exp"`` or ``"hbm"``."""
        times = {"mma": self.mma_ms, "exp": self.exp_ms or 0.0, "hbm": self.hbm_ms}
        return max(times, key=lambda name: times[name])


def operations(pairs: int, head_dim: int) -> int:
    """Forward operations of some kept pairs: a multiply and an add in each of two products."""
    return 4 * head_dim * pairs


def roofline(workload: Workload, pairs: int, limits: Limits) -> Roofline:
    """The bounds of a row.

    Exponentials run at a fixed ratio to matrix operations, so that their time follows from the
    measured matmul rate, at the clock at which that was measured.

    Args:
        workload: the row.
        pairs: its kept (query, key) pairs.
        limits: of the device.
    """
    flops_per_ms = limits.matmul_tflops * 1e9
    exps = pairs * (1 + 2 / _KEYS_PER_RESCALE)
    exp_ms = None
    if limits.matmul_per_exp is not None:
        exp_ms = exps * limits.matmul_per_exp / flops_per_ms
    return Roofline(
        mma_ms=operations(pairs, workload.head_dim) / flops_per_ms,
        exp_ms=exp_ms,
        hbm_ms=workload.total_bytes() / (limits.read_tbps * 1e9),
    )
