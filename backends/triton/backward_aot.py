"""Compile the plain Triton backward for an architecture without its GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton.compiler import ASTSource

from portattn.backends.triton.aot import Compiled, compile_for, example_inputs
from portattn.backends.triton.backward_columns import column_kernel
from portattn.backends.triton.backward_rows import row_kernel
from portattn.backends.triton.backward_sides import constants_of
from portattn.backends.triton.variant import PassShape

if TYPE_CHECKING:
    from portattn.backends.triton.backward_config import TritonBackwardConfig
    from portattn.problem import AttentionProblem

_TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
_TENSORS = ("q_ptr", "k_ptr", "v_ptr", "do_ptr", "bias_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
_FLOATS = ("stats_ptr", "slopes_ptr", "sums_ptr", "running_ptr", "slots_ptr", "dbias_ptr")


def compile_backward(
    problem: AttentionProblem,
    config: TritonBackwardConfig,
    arch: str,
    part: str,
    *,
    stepped: bool = False,
    ids: bool = False,
    pieces: bool = False,
    first: bool = True,
    last: bool = True,
    sums: int = 0,
) -> Compiled:
    """Compile the variant that one launch of the problem would run.

    Args:
        problem: sizes, dtype and features.
        config: a feasible config.
        arch: ``"sm_80"``, ``"gfx942"``, ...
        part: ``"column"`` for dK and dV, ``"row"`` for dQ.
        stepped, ids, pieces, first, last: as in `aot.compile_forward`.
        sums: which sums for the gradients of score terms; with any, dQ's kernel also writes the
            gradient of the bias.

    Raises:
        Exception: whatever the compiler raises; none is expected for feasible configs.
    """
    inputs = example_inputs(problem)
    kernel = column_kernel if part == "column" else row_kernel
    shape = PassShape(0, 1, stepped, ids)
    constants: dict[str, Any] = constants_of(
        inputs, part, shape, config, 16 // inputs.query.element_size(), arch=arch,
        pieces=pieces, first=first, last=last, sums=sums,
    )  # fmt: skip
    has_dbias = part == "row" and sums > 0 and inputs.bias is not None
    if part == "row":
        constants["DBIAS"] = has_dbias
    absent = {
        "slopes_ptr": inputs.alibi_slopes is None,
        "bias_ptr": inputs.bias is None,
        "dbias_ptr": not has_dbias,
        "sums_ptr": sums == 0,
        "running_ptr": first and last,
        "slots_ptr": not pieces,
        "counters_ptr": not pieces,
        "layout_ids_ptr": not ids,
        "q_ids_ptr": not ids,
        "k_ids_ptr": not ids,
    }
    constants |= {name: None for name, is_absent in absent.items() if is_absent}
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in _TENSORS:
            signature[name] = _TYPES[problem.dtype]
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in _FLOATS else "*i32"
        else:
            signature[name] = parameter.annotation_type
    constants = {p.name: constants[p.name] for p in kernel.params if p.name in constants}
    source = ASTSource(kernel, signature, constants, {})
    warps, stages = getattr(config, f"{part}_warps"), getattr(config, f"{part}_stages")
    return compile_for(source, arch, warps, stages)
