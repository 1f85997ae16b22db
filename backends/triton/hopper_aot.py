"""Compile the Hopper forward without a GPU, and see what it takes.

An impossible combination may abort the compiler's process: compile in a process of its own.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.nvidia.compiler import get_ptxas

from portattn.backends.triton.aot import example_inputs, target_of
from portattn.backends.triton.hopper_adapter import GluonASTSource, gl
from portattn.backends.triton.hopper_config import CONSUMER_ROWS, widths
from portattn.backends.triton.hopper_kernel import hopper_forward
from portattn.backends.triton.hopper_sass import unwritten
from portattn.backends.triton.hopper_variant import (
    HopperPass,
    HopperVariant,
    compile_options,
    make_variant,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.backends.triton.hopper_config import TritonForwardHopperConfig
    from portattn.problem import AttentionProblem

_TYPES = {"float16": "fp16", "bfloat16": "bf16"}
_FLOATS = (
    "lse_ptr", "running_out_ptr", "running_lse_ptr", "slots_out_ptr", "slots_lse_ptr",
    "slopes_ptr", "sinks_ptr",
)  # fmt: skip
_SPILLS = ("LDL", "STL")
_EXP2 = "MUFU.EX2"


@dataclasses.dataclass(frozen=True, slots=True)
class CompiledHopper:
    """What the compiler made.

    Attributes:
        shared_bytes: shared memory of a program.
        stack_bytes: per thread; spills show as stack.
        loop_spills: spill instructions in the consumers' loops over full tiles.
        late_exponentials: exponentials in them that wait for a product instead of hiding it.
        unwritten: instructions that read what was not written (`hopper_sass.unwritten`).
        warnings: those of ptxas.
    """

    shared_bytes: int
    stack_bytes: int
    loop_spills: int
    late_exponentials: int
    unwritten: tuple[str, ...]
    warnings: tuple[str, ...]


def _signature(
    variant: HopperVariant, block_k: int, block_d: int, block_dv: int, dtype: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the run-time parameters and values of the others, as the launcher finds them."""
    layout = repr(gl.NVMMASharedLayout(128, 16, rank=5))
    boxes = {
        "q": (CONSUMER_ROWS, block_d),
        "k": (block_k, block_d),
        "v": (block_k, block_dv),
        "out": (CONSUMER_ROWS, block_dv),
    }
    absent = {
        "lse_ptr": not variant.store_lse,
        "running_out_ptr": variant.first and variant.last,
        "running_lse_ptr": variant.first and variant.last,
        "slots_out_ptr": not variant.pieces,
        "slots_lse_ptr": not variant.pieces,
        "layout_ids_ptr": not variant.ids,
        "q_ids_ptr": not variant.ids,
        "k_ids_ptr": not variant.ids,
        "slopes_ptr": not variant.alibi,
        "sinks_ptr": not variant.sinks,
    }
    signature, constants = dict[str, str](), dict[str, Any](variant.constants())
    for parameter in hopper_forward.params:
        name = parameter.name
        tensor, _, form = name.partition("_")
        is_map = tensor in boxes and form in ("desc", "long", "short")
        if absent.get(name) or (is_map and form != "desc" and not variant.stepped):
            constants[name] = None
        if name in constants:
            signature[name] = "constexpr"
        elif is_map:
            rows, width = boxes[tensor]
            signature[name] = f"tensordesc<{_TYPES[dtype]}[1, 1, 1, {rows}, {width}],{layout}>"
        elif name.endswith("_ptr"):
            types = dict.fromkeys(_FLOATS, "*fp32") | {"out_ptr": f"*{_TYPES[dtype]}"}
            signature[name] = types.get(name, "*i32")
        else:
            signature[name] = parameter.annotation_type
    return signature, constants


def compile_hopper(
    problem: AttentionProblem,
    config: TritonForwardHopperConfig,
    *,
    stepped: bool = False,
    ids: bool = False,
    packed: bool = False,
    pieces: bool = False,
    first: bool = True,
    last: bool = True,
) -> CompiledHopper:
    """Compile the variant that one pass of the problem would run.

    Args:
        problem: sizes, dtype and features.
        config: a feasible config.
        stepped: the pass has tiles of step > 1.
        ids: it has id tiles.
        packed: its tiles may begin with documents.
        pieces: the schedule cut a row.
        first, last: which of the plan's passes it is.

    Raises:
        Exception: whatever the compiler raises; none is expected for feasible configs.
    """
    step = 2 if stepped else 1
    shape = HopperPass(0, 1, step, step, stepped, ids)
    variant = make_variant(
        example_inputs(problem), config, shape, pieces=pieces, first=first, last=last
    )
    if packed:
        variant = dataclasses.replace(variant, short_width=problem.head_dim_v)
    signature, constants = _signature(variant, config.block_k, *widths(problem), problem.dtype)
    made = triton.compile(
        GluonASTSource(hopper_forward, signature, constexprs=constants),
        target=target_of("sm_90"),
        options=compile_options(config.block_q),
    )
    assembler = ["-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a", "-o", os.devnull]
    log = run_tool(get_ptxas(90).path, assembler, made.asm["ptx"])
    bundled = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    dumper = os.path.join(bundled, "cuobjdump")
    code = run_tool(dumper, ["-res-usage", "-sass"], made.asm["cubin"])
    stack = re.search(r"STACK:(\d+)", code)
    loops = main_loops(code)
    return CompiledHopper(
        int(made.metadata.shared),
        int(stack[1]) if stack else 0,
        spills(loops),
        late_exponentials(loops),
        tuple(unwritten(code)),
        tuple(re.findall(r"\(C75\d\d\).*", log)),
    )


def run_tool(tool: str, arguments: Sequence[str], text: str | bytes) -> str:
    """Both streams of a tool that Triton brings along, on a file of this text."""
    suffix = ".ptx" if isinstance(text, str) else ".cubin"
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(text.encode() if isinstance(text, str) else text)
        file.flush()
        result = subprocess.run(
            [tool, *arguments, file.name], capture_output=True, text=True, check=True
        )
    return result.stdout + result.stderr


def main_loops(sass: str) -> list[list[str]]:
    """The instructions of the consumers' loops over full tiles.

    Raises:
        ValueError: the code has no loop with matrix products and exponentials.
    """
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in lines]
    index = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (address, text) in enumerate(code):
        jump = re.search(r"BRA\b.*?(0x[0-9a-f]+)", text)
        target = int(jump[1], 16) if jump else address + 1
        if target <= address and target in index:
            body = [instruction for _, instruction in code[index[target] : i + 1]]
            if all(any(name in text for text in body) for name in ("HGMMA", _EXP2)):
                loops.append(body)
    if not loops:
        raise ValueError("the code has no loop with matrix products and exponentials")
    # The consumers' loops differ by a few instructions; those over partial tiles are far longer.
    longest = 1.15 * min(map(len, loops))
    return [body for body in loops if len(body) <= longest]


def spills(loops: Sequence[Sequence[str]]) -> int:
    """Spill instructions in the loops."""
    return sum(any(name in text for name in _SPILLS) for body in loops for text in body)


def late_exponentials(loops: Sequence[Sequence[str]]) -> int:
    """Exponentials that come after the wait for the product that they should run beside."""
    late = 0
    for body in loops:
        waits = [i for i, text in enumerate(body) if "DEPBAR.LE gsb0, 0x0" in text]
        late += sum(_EXP2 in text for text in body[waits[0] :]) if waits else 0
    return late
