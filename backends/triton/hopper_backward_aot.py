"""Compile the Hopper backward without a GPU, and see what it takes.

An impossible combination may abort the compiler's process: compile in a process of its own.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.nvidia.compiler import get_ptxas

from portattn.backends.triton.aot import target_of
from portattn.backends.triton.hopper_adapter import GluonASTSource, gl
from portattn.backends.triton.hopper_aot import main_loops, run_tool, spills
from portattn.backends.triton.hopper_backward_config import BLOCK_K, BLOCK_Q, width_of
from portattn.backends.triton.hopper_backward_kernel import (
    LAUNCH_REGISTERS,
    MAPS,
    hopper_backward,
)

if TYPE_CHECKING:
    from portattn.backends.triton.hopper_backward_config import TritonBackwardHopperConfig
    from portattn.problem import AttentionProblem

_TYPES = {"float16": "fp16", "bfloat16": "bf16"}
_EXP2 = "MUFU.EX2"


@dataclasses.dataclass(frozen=True, slots=True)
class CompiledHopperBackward:
    """What the compiler made.

    Attributes:
        shared_bytes: shared memory of a program.
        loop_spills: spill instructions in the consumers' loops over full tiles.
        late_exponentials: exponentials in them that wait for products instead of hiding them.
        warnings: those of ptxas.
    """

    shared_bytes: int
    loop_spills: int
    late_exponentials: int
    warnings: tuple[str, ...]


def compile_hopper_backward(
    problem: AttentionProblem,
    config: TritonBackwardHopperConfig,
    *,
    stepped: bool = False,
    ids: bool = False,
    accumulate: bool = False,
) -> CompiledHopperBackward:
    """Compile the variant that one pass of the problem would run.

    Args:
        problem: sizes and dtype.
        config: a feasible config.
        stepped, ids: the pass has tiles of step > 1, or id tiles.
        accumulate: items share keys.

    Raises:
        Exception: whatever the compiler raises; none is expected for feasible configs.
    """
    width = width_of(problem.head_dim, problem.head_dim_v)
    dtype = _TYPES[problem.dtype]
    layout = repr(gl.NVMMASharedLayout(128, 16, rank=5))
    constants: dict[str, Any] = {
        "NUM_STAGES": config.num_stages,
        "REGISTERS": config.registers,
        "STEPPED": stepped,
        "IDS": ids,
        "ACCUMULATE": accumulate,
    }
    absent = {name for name in MAPS if not name.endswith("_desc") and not stepped}
    absent |= set() if ids else {"layout_ids_ptr", "q_ids_ptr", "k_ids_ptr"}
    constants |= dict.fromkeys(absent)
    signature = {}
    for parameter in hopper_backward.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in MAPS:
            rows = BLOCK_K if name[0] in "kv" else BLOCK_Q
            signature[name] = f"tensordesc<{dtype}[1, 1, 1, {rows}, {width}],{layout}>"
            if name.startswith("dq"):
                form = f"fp32[1, 1, 1, {rows}, {width // 2}]"
                wide = repr(gl.NVMMASharedLayout(128, 32, rank=5))
                signature[name] = f"tensordesc<{form},{wide}>"
        elif name in ("dk_ptr", "dv_ptr") and not accumulate:
            signature[name] = f"*{dtype}"
        elif name in ("stats_ptr", "dk_ptr", "dv_ptr"):
            signature[name] = "*fp32"
        else:
            is_pointer = name.endswith("_ptr")
            signature[name] = "*i32" if is_pointer else parameter.annotation_type
    made = triton.compile(
        GluonASTSource(hopper_backward, signature, constexprs=constants),
        target=target_of("sm_90"),
        options={"num_warps": 4, "maxnreg": LAUNCH_REGISTERS, "enable_fp_fusion": True},
    )
    assembler = ["-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a", "-o", os.devnull]
    log = run_tool(get_ptxas(90).path, assembler, made.asm["ptx"])
    bundled = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    code = run_tool(os.path.join(bundled, "cuobjdump"), ["-sass"], made.asm["cubin"])
    loops = main_loops(code)
    return CompiledHopperBackward(
        int(made.metadata.shared),
        spills(loops),
        sum(_late_exponentials(body) for body in loops),
        tuple(re.findall(r"\(C75\d\d\).*", log)),
    )


def _late_exponentials(body: list[str]) -> int:
    """Exponentials after the first wait for everything: that is where dK and dQ must be done."""
    waits = [i for i, text in enumerate(body) if "DEPBAR.LE gsb0, 0x0" in text]
    return sum(_EXP2 in text for text in body[waits[0] :]) if waits else 0
