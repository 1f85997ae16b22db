"""The kernels of docs/targets.md: how a case of each compiles, for which architectures.

A kernel is one line of KERNELS, and two functions.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from portattn import masks
from portattn.problem import AttentionProblem

if TYPE_CHECKING:
    from collections.abc import Callable

    from portattn.backends.base import Config

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx950")
HEAD_DIMS = (64, 128, 256)
SPARSE = masks.sliding_window(1024)
NO_TERMS = (False, False, False)


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What one compiled default config takes; shared memory per block, the rest per thread."""

    registers: int
    shared_bytes: int
    spill_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """One section of the table.

    Attributes:
        name: of the kernel in the registry.
        default: the default config of a problem on an architecture.
        compile: compiles that config.
        archs: architectures that it is for.
        cases: name -> problem.
    """

    name: str
    default: Callable[[AttentionProblem, str], Config]
    compile: Callable[[AttentionProblem, str], Usage]
    archs: tuple[str, ...]
    cases: dict[str, AttentionProblem]


def cases(dtypes: tuple[str, ...], patterns: tuple[str, ...]) -> dict[str, AttentionProblem]:
    """Problems of every head dim, dtype and pattern (``"dense"``, ``"sparse"``)."""
    programs = {"dense": (), "sparse": tuple(SPARSE.program)}
    return {
        f"{dtype} D{dim} {pattern}".strip(): AttentionProblem(
            "cuda", dtype, 1, 8, 8, 4096, 4096, dim, dim,
            programs.get(pattern, ()), 0, frozenset({"lse"}),
        )
        for dtype in dtypes
        for dim in HEAD_DIMS
        for pattern in patterns
    }  # fmt: skip


def decode_cases() -> dict[str, AttentionProblem]:
    """One query row of 32 heads, 8 KV heads, lengths on the device."""
    return {
        f"bfloat16 D{dim}": AttentionProblem(
            "cuda", "bfloat16", 16, 32, 8, 1, 8192, dim, dim, (), 0, frozenset({"kv_lengths"})
        )
        for dim in HEAD_DIMS
    }


def triton_forward_default(problem: AttentionProblem, arch: str) -> Config:
    """See `Kernel.default`."""
    from portattn.backends.triton.config import default_for
    from portattn.backends.triton.limits import limits_of

    return default_for(problem, limits_of(arch))


def triton_forward(problem: AttentionProblem, arch: str) -> Usage:
    """Masked problems with cut rows, as their schedules have."""
    from portattn.backends.triton.aot import compile_forward
    from portattn.backends.triton.config import default_for
    from portattn.backends.triton.limits import limits_of

    config = default_for(problem, limits_of(arch))
    made = compile_forward(problem, config, arch, pieces=problem.program != ())
    return Usage(made.registers, made.shared_bytes, made.spill_bytes)


def capability(arch: str) -> tuple[int, int]:
    """``"sm_120"`` -> (12, 0)."""
    return divmod(int(arch.removeprefix("sm_")), 10)


def cupy_forward_sm80_default(problem: AttentionProblem, arch: str) -> Config:
    """See `Kernel.default`."""
    from portattn.backends.cupy.config import default_config

    return default_config(problem, capability(arch))


def cupy_forward_sm80(problem: AttentionProblem, arch: str) -> Usage:
    """One variant for all masks."""
    from portattn.backends.cupy.config import default_config, variant
    from portattn.backends.cupy.loader import compile_program

    config = default_config(problem, capability(arch))
    made = variant(problem.dtype, problem.head_dim, problem.head_dim_v, True, NO_TERMS, config)
    used = compile_program(made.program(arch)).resources()
    return Usage(used.registers, made.shared_bytes(), used.spill_store_bytes)


def cupy_forward_sm90_default(problem: AttentionProblem, arch: str) -> Config:
    """See `Kernel.default`."""
    from portattn.backends.cupy.config_sm90 import default_config

    return default_config(problem)


def cupy_forward_sm90(problem: AttentionProblem, arch: str) -> Usage:
    """Registers are those at the launch; then warpgroups divide them as the config says."""
    from portattn.backends.cupy.config_sm90 import default_config, variant
    from portattn.backends.cupy.loader import compile_program

    dims = (problem.head_dim, problem.head_dim_v)
    made = variant(problem.dtype, *dims, True, NO_TERMS, False, False, default_config(problem))
    used = compile_program(made.program()).resources()
    return Usage(used.registers, made.shared_bytes(), used.spill_store_bytes)


def cupy_decode_default(problem: AttentionProblem, arch: str) -> Config:
    """See `Kernel.default`."""
    from portattn.backends.cupy.config_decode import default_config

    return default_config(problem, capability(arch))


def cupy_decode(problem: AttentionProblem, arch: str) -> Usage:
    """One variant for all masks and lengths."""
    from portattn.backends.cupy.config_decode import (
        DecodeVariant,
        block_q,
        default_config,
        num_rows,
    )
    from portattn.backends.cupy.loader import compile_program

    config = default_config(problem, capability(arch))
    dims = (problem.head_dim, problem.head_dim_v)
    rows = block_q(num_rows(problem))
    made = DecodeVariant(problem.dtype, *dims, rows, True, *NO_TERMS, config)
    used = compile_program(made.program(arch)).resources()
    return Usage(used.registers, made.shared_bytes(), used.spill_store_bytes)


def triton_decode_default(problem: AttentionProblem, arch: str) -> Config:
    """See `Kernel.default`."""
    from portattn.backends.triton.decode_config import default_for
    from portattn.backends.triton.limits import limits_of

    return default_for(problem, limits_of(arch))


def triton_decode(problem: AttentionProblem, arch: str) -> Usage:
    """Contiguous, aligned tensors."""
    from portattn.backends.triton.decode_aot import compile_decode

    made = compile_decode(problem, triton_decode_default(problem, arch), arch)
    return Usage(made.registers, made.shared_bytes, made.spill_bytes)


def triton_forward_hopper_default(problem: AttentionProblem, arch: str) -> Config:
    """See `Kernel.default`."""
    from portattn.backends.triton.hopper_config import default_for

    return default_for(problem)


def triton_forward_hopper(problem: AttentionProblem, arch: str) -> Usage:
    """Registers are the launch's, for consumers the config's; what is spilled is the stack."""
    from portattn.backends.triton.hopper_aot import compile_hopper
    from portattn.backends.triton.hopper_config import LAUNCH_REGISTERS, default_for

    config = default_for(problem)
    made = compile_hopper(problem, config, pieces=problem.program != ())
    return Usage(LAUNCH_REGISTERS[config.block_q], made.shared_bytes, made.stack_bytes)


BOTH, HALF, FLOATS = ("dense", "sparse"), ("bfloat16",), ("bfloat16", "float32")
# fmt: off
KERNELS = (
    Kernel("triton_forward_hopper", triton_forward_hopper_default, triton_forward_hopper, ("sm_90",), cases(HALF, BOTH)),  # noqa: E501
    Kernel("triton_forward", triton_forward_default, triton_forward, NVIDIA + AMD, cases(FLOATS, BOTH)),  # noqa: E501
    Kernel("triton_decode", triton_decode_default, triton_decode, ("sm_80", "sm_86", "sm_90", "sm_120", "gfx942", "gfx950"), decode_cases()),  # noqa: E501
    Kernel("cupy_forward_sm90", cupy_forward_sm90_default, cupy_forward_sm90, ("sm_90",), cases(HALF, BOTH)),  # noqa: E501
    Kernel("cupy_forward_sm80", cupy_forward_sm80_default, cupy_forward_sm80, NVIDIA, cases(FLOATS, ("",))),  # noqa: E501
    Kernel("cupy_decode", cupy_decode_default, cupy_decode, ("sm_80", "sm_90"), decode_cases()),
)
# fmt: on
