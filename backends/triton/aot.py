"""Compile the forward for an architecture without its GPU, and see what a program takes.

Used by the compile gate of the tests, and fit for pruning configs on a machine without a device.
An impossible combination may abort the compiler's process: compile each architecture in a process
of its own.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from portattn.backends.base import AttentionInputs
from portattn.backends.triton.forward_kernel import forward_kernel
from portattn.backends.triton.variant import PassShape, Variant, make_variant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portattn.backends.triton.config import TritonForwardConfig
    from portattn.problem import AttentionProblem

_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_TENSORS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "bias_ptr")
_FLOATS = (
    "lse_ptr",
    "running_out_ptr",
    "running_lse_ptr",
    "slots_out_ptr",
    "slots_lse_ptr",
    "slopes_ptr",
    "sinks_ptr",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made.

    Attributes:
        shared_bytes: shared memory of a program.
        registers: per thread; 0 where not reported (AMD: VGPRs).
        spill_bytes: stack (NVIDIA) or scratch (AMD) bytes per thread.
        seconds: compile time.
        text: PTX or GCN assembly.
    """

    shared_bytes: int
    registers: int
    spill_bytes: int
    seconds: float
    text: str = dataclasses.field(repr=False)


def target_of(arch: str) -> GPUTarget:
    """``"sm_90"``, ``"gfx942"``, ... as Triton names it."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def example_inputs(problem: AttentionProblem, device: str = "meta") -> AttentionInputs:
    """A call of the problem whose tensors hold nothing, on `device`."""
    dtype = problem.torch_dtype

    def empty(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    b, hq, hkv = problem.batch, problem.num_heads, problem.num_kv_heads
    sq, sk, d, dv = problem.seqlen_q, problem.seqlen_k, problem.head_dim, problem.head_dim_v
    has = problem.features.__contains__
    return AttentionInputs(
        query=empty(b, hq, sq, d),
        key=empty(b, hkv, sk, d),
        value=empty(b, hkv, sk, dv),
        output=empty(b, hq, sq, dv),
        lse=empty(b, hq, sq, dtype=torch.float32) if has("lse") else None,
        mask=None,
        q_offset=0,
        kv_lengths=empty(b, dtype=torch.int32) if has("kv_lengths") else None,
        scale=1.0,
        softcap=30.0 if has("softcap") else 0.0,
        alibi_slopes=empty(hq, dtype=torch.float32) if has("alibi") else None,
        bias=empty(1, 1, sq, sk) if has("bias") else None,
        sinks=empty(hq, dtype=torch.float32) if has("sinks") else None,
        deterministic=False,
    )


def _signature(
    inputs: AttentionInputs, variant: Variant, dtype: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the run-time parameters and values of the others, as the launcher finds them."""
    constants: dict[str, Any] = dict(variant.constants())
    absent = {
        "k_desc": not variant.tma,
        "v_desc": not variant.tma,
        "lse_ptr": inputs.lse is None,
        "running_out_ptr": variant.first and variant.last,
        "running_lse_ptr": variant.first and variant.last,
        "slots_out_ptr": not variant.pieces,
        "slots_lse_ptr": not variant.pieces,
        "counters_ptr": not variant.pieces,
        "layout_ids_ptr": not variant.ids,
        "q_ids_ptr": not variant.ids,
        "k_ids_ptr": not variant.ids,
        "slopes_ptr": inputs.alibi_slopes is None,
        "bias_ptr": inputs.bias is None,
        "sinks_ptr": inputs.sinks is None,
    }
    constants.update({name: None for name, is_absent in absent.items() if is_absent})
    signature = {}
    for parameter in forward_kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in _TENSORS:
            signature[name] = f"*{_TYPES[dtype]}"
        elif name in _FLOATS:
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = "*i32"
        elif name.endswith("_desc"):
            width = variant.block_d if name == "k_desc" else variant.block_dv
            tile = torch.empty((1, 1, variant.block_k, width), dtype=inputs.query.dtype)
            sizes = [1, 1, variant.block_k, width]
            signature[name] = mangle_type(TensorDescriptor.from_tensor(tile, sizes))
        else:
            signature[name] = parameter.annotation_type
    return signature, constants


def compile_forward(
    problem: AttentionProblem,
    config: TritonForwardConfig,
    arch: str,
    *,
    stepped: bool = False,
    ids: bool = False,
    pieces: bool = False,
    first: bool = True,
    last: bool = True,
) -> Compiled:
    """Compile the variant that one pass of the problem would run.

    Args:
        problem: sizes, dtype and features.
        config: a feasible config.
        arch: ``"sm_80"``, ``"gfx942"``, ...
        stepped: the pass has key tiles of step > 1.
        ids: it has id tiles.
        pieces: the schedule cut a row.
        first, last: which of the plan's passes it is.

    Raises:
        Exception: whatever the compiler raises; none is expected for feasible configs.
    """
    inputs = example_inputs(problem)
    variant = make_variant(
        inputs,
        config,
        PassShape(0, 1, stepped, ids),
        arch=arch,
        vector=16 // inputs.query.element_size(),
        tma=config.tma and not stepped,
        pieces=pieces,
        first=first,
        last=last,
    )
    signature, constants = _signature(inputs, variant, problem.dtype)
    return compile_for(
        ASTSource(forward_kernel, signature, constants, {}),
        arch,
        config.num_warps,
        config.num_stages,
    )


def compile_for(source: ASTSource, arch: str, num_warps: int, num_stages: int) -> Compiled:
    """Compile a kernel for an architecture, with the options of every launch."""
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    started = time.perf_counter()
    made = triton.compile(source, target=target_of(arch), options=options)
    seconds = time.perf_counter() - started
    if "cubin" in made.asm:
        registers, spill_bytes = _cubin_usage(made.asm["cubin"])
        text = made.asm["ptx"]
    else:
        text = made.asm["amdgcn"]
        registers, spill_bytes = (
            _number(text, rf"\.{name}:\s+(\d+)")
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
    return Compiled(int(made.metadata.shared), registers, spill_bytes, seconds, text)


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a cubin; spills show as stack."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    text = result.stdout + result.stderr
    return _number(text, r"REG:(\d+)"), _number(text, r"STACK:(\d+)")


def summary(compiled: Compiled) -> Mapping[str, int]:
    """The figures that ceilings are kept for."""
    return {"shared_bytes": compiled.shared_bytes, "spill_bytes": compiled.spill_bytes}
