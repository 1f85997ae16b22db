"""What a run of the tuner does, as plain values: so that another process can go on with it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from portattn import dispatch
from portattn.backends import registry
from portattn.backends.base import Kernel
from portattn.tuning_db.identity import sha256, source_of_files, toolchain
from portattn.tuning_db.key import bucket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.device import DeviceKey
    from portattn.tuner.cases import Case

_SHAPE = (
    *("batch", "num_heads", "num_kv_heads", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v"),
    *("q_offset", "dtype"),
)
_DIGEST_CHARS = 16
_PROGRAM_CHARS = 16384


def shape_of(case: Case) -> dict[str, int | str]:
    """What exactly is computed, as measurements hold it: problems of one bucket differ in it."""
    problem, mask = case.problem, case.mask
    shape: dict[str, int | str] = {name: getattr(problem, name) for name in _SHAPE}
    shape["features"] = "+".join(sorted(problem.features))
    if problem.program:
        digests = mask.digests if mask is not None else ()
        shape["mask"] = sha256([problem.program, digests])[:_DIGEST_CHARS]
        program = " ".join(map(str, problem.program))
        if len(program) <= _PROGRAM_CHARS:  # so that `--stale` can make the problem again
            shape["program"] = program
    return shape


def describe(
    problems: Sequence[Case],
    device: DeviceKey,
    policy: str,
    kernels: Sequence[str | Kernel] | None,
    *,
    seed: int,
    most: int | None,
) -> dict[str, Any]:
    """Everything that decides what is measured; runs with equal values do the same.

    Time budgets do not count: a run that ran out of time is continued with another.
    """
    wanted = dispatch.candidates("auto") if kernels is None else kernels
    sources: dict[str, str] = {}
    for one in wanted:
        if isinstance(one, Kernel) or one in registry.KERNELS:
            kernel = one if isinstance(one, Kernel) else registry.kernel(one)
            files = tuple(str(file) for file in kernel.source_files())
            sources[kernel.name] = source_of_files(files)
    return {
        "device": device.fingerprint,
        "toolchain": sha256(toolchain()),
        "policy": policy,
        "problems": [
            [sha256(dataclasses.asdict(bucket(case.problem))), shape_of(case)] for case in problems
        ],
        "kernels": sources,
        "seed": seed,
        "most": most,
    }
