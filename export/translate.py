"""``portattn::attention`` in a torch graph -> one ``com.portattn::Attention`` node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import onnxscript
import torch

import portattn.ops  # noqa: F401  defines torch.ops.portattn
from portattn.export.expression import parse_program
from portattn.export.function_body import depends_on_position
from portattn.export.schema import DOMAIN, OP_NAME, OP_VERSION, OPSET

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A value of the graph being written; onnxscript has no public type for it.
Symbolic: TypeAlias = Any


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=...)``."""
    return {torch.ops.portattn.attention.default: translate_attention}


def translate_attention(
    query: Symbolic,
    key: Symbolic,
    value: Symbolic,
    program: Sequence[int],
    mask_data: Sequence[Symbolic],
    q_offset: Symbolic,
    q_offset_mode: str,
    kv_lengths: Symbolic,
    alibi_slopes: Symbolic,
    bias: Symbolic,
    sinks: Symbolic,
    scale: float | None,
    softcap: float,
    return_lse: bool,
    deterministic: bool,
    backend: str,
    config: str,
) -> tuple[Symbolic, Symbolic]:
    """Emit the node; arguments as in portattn/ops/schema.py, tensors as symbolic values.

    What says how torch runs the call (deterministic, backend, config) has no meaning in a model.
    """
    standard = onnxscript.values.Opset("", OPSET)
    custom = onnxscript.values.Opset(DOMAIN, OP_VERSION)
    attributes: dict[str, Any] = {"program": list(program)} if program else {}
    offset_input = None
    if q_offset_mode == "unset":
        expression = parse_program(program)
        if not depends_on_position(expression, alibi_slopes is not None):
            q_offset_mode = "start"
    elif q_offset_mode == "value" and isinstance(q_offset, int):
        attributes["q_offset"] = q_offset
    elif q_offset_mode == "value":
        offset_input = standard.Reshape(q_offset, standard.Constant(value_ints=[1]))
    if bias is not None and len(bias.shape) < 4:
        missing = list(range(4 - len(bias.shape)))
        bias = standard.Unsqueeze(bias, standard.Constant(value_ints=missing))
    output, lse = getattr(custom, OP_NAME)(
        query,
        key,
        value,
        offset_input,
        kv_lengths,
        alibi_slopes,
        bias,
        sinks,
        *mask_data,
        **attributes,
        q_offset_mode=q_offset_mode,
        scale=float(query.shape[-1]) ** -0.5 if scale is None else float(scale),
        softcap=float(softcap),
    )
    return output, lse
