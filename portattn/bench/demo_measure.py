"""Time and memory of one call, and exact rows to hold it against."""

from __future__ import annotations

import ctypes
import dataclasses
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from portattn.bench.demo_text import LayerInput
    from portattn.masks import Mask

_PEAK = "VmHWM:"  # the process's highest resident memory since it was last reset


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def extra_bytes(call: Callable[[], object]) -> int:
    """How far the call raises this process's resident memory above what it was before.

    What earlier calls freed is given back to the system first: it would hide the call's own.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = _status_bytes(_PEAK)
    call()
    return max(0, _status_bytes(_PEAK) - before)


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """The median time of the calls; the caller has warmed up."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@dataclasses.dataclass(frozen=True, slots=True)
class ExactRows:
    """Some rows of the output, computed in float64 from the float32 inputs.

    Attributes:
        rows: int64 [count], increasing.
        output: float64 [1, num_heads, count, head_dim].
    """

    rows: torch.Tensor
    output: torch.Tensor

    def error(self, output: torch.Tensor, first_row: int = 0) -> float:
        """The largest absolute error of an output whose row 0 is first_row.

        Args:
            output: [1, num_heads, n, head_dim]; the sampled rows inside it are compared.
            first_row: where it begins.
        """
        inside = (self.rows >= first_row) & (self.rows < first_row + output.shape[2])
        found = output[:, :, self.rows[inside] - first_row].double()
        return float((found - self.output[:, :, inside]).abs().max())


def exact_rows(inputs: LayerInput, mask: Mask | None, rows: torch.Tensor) -> ExactRows:
    """The rows by the definition, softmax(q k^T / sqrt(d)) v over the kept keys, in float64."""
    outputs = []
    key, value = inputs.key.double(), inputs.value.double()
    positions = np.arange(inputs.num_tokens)
    for start in range(0, len(rows), 8):  # scores of 8 rows, 12 heads, 100,000 keys take 77 MB
        some = rows[start : start + 8]
        query = inputs.query[:, :, some].double() * inputs.query.shape[-1] ** -0.5
        scores = query @ key.transpose(-1, -2)
        if mask is not None:
            kept = mask.keeps(some.numpy()[:, None], positions, seqlen_k=inputs.num_tokens)
            scores.masked_fill_(~torch.from_numpy(kept), float("-inf"))
        outputs.append(scores.softmax(-1) @ value)
    return ExactRows(rows, torch.cat(outputs, dim=2))
