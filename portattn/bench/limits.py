"""What a device can do at most, measured now: what achieved rates are a share of."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from portattn.backends.cpu import abi
from portattn.bench import rounds

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclasses.dataclass(frozen=True, slots=True)
class CpuLimits:
    """Measured limits of this CPU with some threads.

    Attributes:
        threads: how many ran at once.
        isa: the instruction set in use.
        fma_gflops: float32 multiply-adds, 2 operations each, in 10^9 a second.
        read_gbps: reading memory that no cache holds, in 10^9 bytes a second.
    """

    threads: int
    isa: str
    fma_gflops: float
    read_gbps: float


def cpu_limits(threads: int | None = None, *, read_bytes: int = 1 << 28) -> CpuLimits:
    """Measure for half a second or so; the best of several runs counts.

    Args:
        threads: default torch's.
        read_bytes: bytes to read, spread over the threads; more than the caches hold of it.
    """
    threads = torch.get_num_threads() if threads is None else threads
    lib = abi.functions()
    data = torch.ones(read_bytes // 4)
    return CpuLimits(
        threads=threads,
        isa=abi.isa(),
        fma_gflops=float(lib.portattn_cpu_measure_fma(threads, 0.3)),
        read_gbps=float(lib.portattn_cpu_measure_read(data.data_ptr(), read_bytes, threads, 5)),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Measured limits of any device: what achieved rates are a share of.

    Attributes:
        matmul_tflops: a large matrix product in the row's dtype on random data (a CPU: float32
            multiply-adds in registers), in 10^12 operations a second.
        read_tbps: reading memory that no cache holds, in 10^12 bytes a second.
        matmul_per_exp: operations of the matrix units in the time of one exponential; None where
            it is not known.
    """

    matmul_tflops: float
    read_tbps: float
    matmul_per_exp: float | None = None


# Compute capability -> 16-bit matrix operations a clock and SM over exponentials a clock and SM
# (16 on all of them): CUDA programming guide, arithmetic instructions; 4096 on Hopper.
_MATMUL_PER_EXP = {(8, 0): 2048 / 16, (9, 0): 4096 / 16}
_MATMUL_SIZE = 8192
_READ_ELEMENTS = 1 << 29


def device_limits(device: torch.device) -> Limits:
    """Measure a device for a fraction of a second."""
    if device.type == "cpu":
        cpu = cpu_limits()
        return Limits(cpu.fma_gflops / 1e3, cpu.read_gbps / 1e3)
    timer = rounds.timer_for(device)
    measured = Limits(
        matmul_tflops=_matmul_tflops(timer, device),
        read_tbps=_read_tbps(timer, device),
        matmul_per_exp=_MATMUL_PER_EXP.get(torch.cuda.get_device_capability(device)),
    )
    torch.cuda.empty_cache()
    return measured


def _matmul_tflops(timer: rounds.Timer, device: torch.device) -> float:
    """bfloat16, 8192 cubed, random data: zeros draw less power and run faster."""
    sizes = (_MATMUL_SIZE, _MATMUL_SIZE)
    left, right = (torch.randn(sizes, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * _MATMUL_SIZE**3 / _median(timer, lambda: left @ right) / 1e9


def _read_tbps(timer: rounds.Timer, device: torch.device) -> float:
    """Sum of 2 GiB by whichever reduction reads faster: that depends on torch's version."""
    data = torch.ones(_READ_ELEMENTS, device=device)
    reductions: list[Callable[[], object]] = [data.sum, lambda: torch.linalg.vector_norm(data)]
    return data.nbytes / min(_median(timer, call) for call in reductions) / 1e9


def _median(timer: rounds.Timer, call: Callable[[], object]) -> float:
    timer.once(call)
    return timer.rounds({"": call}, 20)[""].median


def as_dict(limits: Limits) -> dict[str, float | None]:
    """The fields by name."""
    return dataclasses.asdict(limits)
