"""Compile the decode for an architecture without its GPU, and see what a program takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton.compiler import ASTSource

from portattn.backends.triton.aot import Compiled, compile_for, example_inputs
from portattn.backends.triton.decode_config import rows_of
from portattn.backends.triton.decode_kernel import decode_kernel
from portattn.backends.triton.decode_launch import make_constants

if TYPE_CHECKING:
    from portattn.backends.triton.decode_config import TritonDecodeConfig
    from portattn.problem import AttentionProblem

_POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
_TENSORS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "bias_ptr")
_INTEGERS = ("counters_ptr", "lengths_ptr")


def compile_decode(problem: AttentionProblem, config: TritonDecodeConfig, arch: str) -> Compiled:
    """Compile the variant that the problem would run with contiguous, aligned tensors.

    Args:
        problem: sizes, dtype and features.
        config: a feasible config.
        arch: ``"sm_80"``, ``"gfx942"``, ...

    Raises:
        Exception: whatever the compiler raises; none is expected for feasible configs.
    """
    inputs = example_inputs(problem)
    vector = 16 // inputs.query.element_size()
    variant = make_constants(inputs, config, vector, rows_of(problem))
    constants: dict[str, Any] = dict(variant.by_name())
    absent = {
        "lse_ptr": inputs.lse is None,
        "lengths_ptr": inputs.kv_lengths is None,
        "slopes_ptr": inputs.alibi_slopes is None,
        "bias_ptr": inputs.bias is None,
        "sinks_ptr": inputs.sinks is None,
    }
    constants.update({name: None for name, is_absent in absent.items() if is_absent})
    signature = {}
    for parameter in decode_kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in _TENSORS:
            signature[name] = _POINTERS[problem.dtype]
        elif name in _INTEGERS:
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
        else:
            signature[name] = parameter.annotation_type
    source = ASTSource(decode_kernel, signature, constants, {})
    return compile_for(source, arch, config.num_warps, config.num_stages)
