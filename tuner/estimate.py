"""What tuning would do, and about how long it would take, without running anything."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from portattn.tuner import pool, session
from portattn.tuner.space import SpaceError, enumerate_space
from portattn.tuning_db.key import bucket

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.backends.base import Kernel
    from portattn.device import DeviceKey
    from portattn.tuner.cases import Case

# Configs of a kernel after which a search has, as a rule, found what it will find.
ENOUGH = 100
# Seconds: to compile one config on one core, by backend (H100 kernels, 2.5 GHz), and to set up,
# verify and record one on a device.
_COMPILE_SECONDS = {"cupy": 2.5, "triton": 3.5}
_OVERHEAD_SECONDS = {"cuda": 0.04, "cpu": 0.02}
_RUNS = 8  # of a config: two to verify it, and the samples
# Rates that attention reaches, FLOP/s: of an H100's multiprocessor, and of a core with AVX2.
_RATES = {"cuda": 4e12, "cpu": 3e10}


@dataclasses.dataclass(frozen=True, slots=True)
class KernelEstimate:
    """One kernel on one problem.

    Attributes:
        name: the kernel.
        declared, feasible: configs.
        infeasible: reason -> how many configs have it as their first reason.
        tried: how many would be tried at most.
        seconds: that takes about this long, if nothing was compiled before.
    """

    name: str
    declared: int
    feasible: int
    infeasible: Mapping[str, int]
    tried: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class ProblemEstimate:
    """One problem.

    Attributes:
        label: its bucket.
        kernels: those that would be tuned.
        refused: kernel -> why it would not.
    """

    label: str
    kernels: tuple[KernelEstimate, ...]
    refused: Mapping[str, tuple[str, ...]]


def estimate(
    problems: Sequence[Case],
    device: DeviceKey,
    kernels: Sequence[str | Kernel] | None = None,
    most: int | None = None,
) -> list[ProblemEstimate]:
    """Count the configs of every kernel for some problems.

    Args:
        problems: what would be tuned.
        device: where.
        kernels, most: as for `portattn.tuner.tune`.
    """
    found, compiled = [], set[tuple[object, ...]]()
    for case in problems:
        usable, refused = session.candidates(case.problem, kernels)
        ready = []
        for kernel in usable:
            try:
                code = session.shared_code(kernel, case.problem)
                ready.append(_kernel(kernel, case, device, most, is_compiled=code in compiled))
                compiled.add(code)
            except SpaceError as error:
                refused[kernel.name] = (str(error),)
        found.append(ProblemEstimate(bucket(case.problem).label, tuple(ready), refused))
    return found


def _kernel(
    kernel: Kernel, case: Case, device: DeviceKey, most: int | None, *, is_compiled: bool
) -> KernelEstimate:
    space = enumerate_space(kernel, case.problem)
    tried = min(len(space.configs), ENOUGH if most is None else most)
    on_gpu = case.problem.device_type == "cuda"
    compiling = 0.0 if is_compiled else _COMPILE_SECONDS.get(kernel.backend, 0.0)
    compiling /= pool.processes() if on_gpu else 1
    kind = "cuda" if on_gpu else "cpu"
    running = _RUNS * _flops(case) / (_RATES[kind] * max(device.cores, 1))
    # Compiling goes on while others run.
    each = max(compiling, running + _OVERHEAD_SECONDS[kind])
    return KernelEstimate(
        kernel.name,
        space.declared,
        len(space.configs),
        dict(sorted(space.infeasible.items(), key=lambda entry: -entry[1])),
        tried,
        tried * each,
    )


def _flops(case: Case) -> float:
    problem = case.problem
    pairs = problem.batch * problem.num_heads * problem.seqlen_q * problem.seqlen_k
    density = 1.0
    if case.mask is not None:
        density = case.mask.density(problem.seqlen_q, problem.seqlen_k, q_offset=problem.q_offset)
    return 2.0 * pairs * density * (problem.head_dim + problem.head_dim_v)
