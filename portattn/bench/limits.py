"""What the CPU can do at most, measured now: what achieved rates are a share of."""

from __future__ import annotations

import dataclasses

import torch

from portattn.backends.cpu import abi


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
