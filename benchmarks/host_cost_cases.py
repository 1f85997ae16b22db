"""What benchmarks/host_cost.py plans and calls: patterns, a kernel that launches nothing."""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from typing import TYPE_CHECKING, ClassVar

import torch

from portattn import masks
from portattn.backends.cuda_launch import Launch
from portattn.backends.cupy.forward_sm80 import CupyForwardSm80
from portattn.plan import Plan, to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from portattn.backends.base import AttentionInputs, Config
    from portattn.backends.cupy.config import Variant
    from portattn.masks import Mask

LONG = 65536
# A function of the C library that does nothing: 0 for the function's handle.
_LABS = ctypes.cast(ctypes.CDLL(None).labs, ctypes.c_void_p).value or 0
BLOCK, WORKERS = 128, 132


@functools.cache
def ends(seqlen: int, count: int) -> list[int]:
    """Uneven documents, as packing gives them."""
    generator = torch.Generator().manual_seed(count)
    cuts = torch.randperm(seqlen - 1, generator=generator)[: count - 1] + 1
    return [0, *cuts.sort().values.tolist(), seqlen]


# Each pattern at a length, twice: what is called before, and what is new after it.
PATTERNS: dict[str, Callable[[int, bool], Mask]] = {
    "causal": lambda seqlen, new: masks.causal(),
    "window": lambda seqlen, new: masks.sliding_window(1024 if new else 512),
    "longformer": lambda seqlen, new: masks.longformer(512 if new else 256, 64),
    "bigbird": lambda seqlen, new: masks.bigbird(64, 3, 3, 2, seed=int(new)),
    "strided": lambda seqlen, new: masks.sparse_transformer_strided(128 if new else 64),
    "local and strided": lambda seqlen, new: (
        masks.causal() & (masks.local(127, 0) | masks.KeyModulo(128 if new else 64, 0, 1))
    ),
    "fixed": lambda seqlen, new: masks.sparse_transformer_fixed(128 if new else 64),
    "documents": lambda seqlen, new: masks.documents(ends(seqlen, 16 if new else 8)),
    "documents, causal": lambda seqlen, new: (
        masks.documents(ends(seqlen, 16 if new else 8)) & masks.causal()
    ),
}


class NoLaunchForward(CupyForwardSm80):
    """The CuPy kernel's host side on the CPU."""

    name: ClassVar[str] = "cupy_without_launches"
    backend: ClassVar[str] = "cpu"

    def _device_reasons(self, problem: object) -> list[str]:
        return []

    def _capability(self, problem: object) -> tuple[int, int]:
        return (8, 0)

    def _workers(self, inputs: AttentionInputs, config: Config) -> int:
        return WORKERS

    def _make_launch(
        self, variant: Variant, device: torch.device, arguments: Sequence[bytes]
    ) -> Launch:
        # Everything up to the driver, and nothing there.
        return Launch(0, arguments, 0, 128, 0, self.name, functions=(_LABS, _LABS))


def planning_us(mask: Mask, seqlen: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Planning and upload without any cache, in microseconds of the host; medians."""
    stages: dict[str, list[float]] = {"plan_us": [], "schedule_us": [], "upload_us": []}
    for _ in range(repeats):
        at = [time.perf_counter()]
        plan = Plan.create(
            mask.program, mask.data, batch=1, num_heads=16, seqlen_q=seqlen, seqlen_k=seqlen,
            q_offset=0, block_q=BLOCK, block_k=BLOCK,
        )  # fmt: skip
        at.append(time.perf_counter())
        schedule = plan.schedule(batch=1, num_heads=16, workers=WORKERS, head_dim_v=128)
        at.append(time.perf_counter())
        to_device(plan, schedule, device)
        at.append(time.perf_counter())
        for name, start, end in zip(stages, at[:-1], at[1:], strict=True):
            stages[name].append((end - start) * 1e6)
        if device.type == "cuda":
            torch.cuda.synchronize()
        del plan, schedule  # not in the next one's time
    medians = {name: statistics.median(values[1:]) for name, values in stages.items()}
    return medians | {"total_us": sum(medians.values())}
