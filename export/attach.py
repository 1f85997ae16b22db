"""Gives each Attention node of a model its function body."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx_ir as ir

from portattn.errors import ExportError
from portattn.export.expression import parse_program
from portattn.export.facts import data_facts
from portattn.export.function_body import NodeSignature, build_function
from portattn.export.schema import (
    DOMAIN,
    FIRST_MASK_INPUT,
    OP_NAME,
    OPSET,
    OPTIONAL_INPUTS,
    REQUIRED_INPUTS,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt


@dataclasses.dataclass(frozen=True, slots=True)
class BodyInfo:
    """How one attention node runs without libportattn.

    Attributes:
        node: the node's name.
        mask: its mask, as text.
        body: "gathered" (memory O(seqlen * keys per block)) or "dense" (O(seqlen_q * seqlen_k)).
        overload: name of its function among the model's.
    """

    node: str
    mask: str
    body: str
    overload: str


def attach_bodies(model: ir.Model) -> tuple[BodyInfo, ...]:
    """Add a function for each distinct Attention node, and point the nodes at them.

    Raises:
        ExportError: the model has another opset (ONNX Runtime would not use its kernels in the
            bodies), or a mask cannot be written in standard ops.
    """
    infos = []
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN or node.op_type != OP_NAME:
            continue
        _drop_unused_lse(node)
        signature = _signature(node)
        function = ir.serde.deserialize_function(build_function(signature))
        node.overload = signature.overload
        model.functions[function.identifier()] = function
        infos.append(
            BodyInfo(
                node=node.name or "",
                mask=str(parse_program(signature.program)),
                body="dense" if signature.cover is None else "gathered",
                overload=signature.overload,
            )
        )
    opset = model.opset_imports.get("")
    if infos and opset != OPSET:
        raise ExportError(
            f"torch.onnx wrote opset {opset} instead of {OPSET}; install onnxscript 0.5 or "
            "newer, which converts"
        )
    return tuple(infos)


def _drop_unused_lse(node: ir.Node) -> None:
    if (
        len(node.outputs) > 1
        and not node.outputs[1].uses()
        and not node.outputs[1].is_graph_output()
    ):
        node.resize_outputs(1)


def _signature(node: ir.Node) -> NodeSignature:
    inputs: Sequence[ir.Value | None] = node.inputs
    optional = {
        name: value
        for name, value in zip(OPTIONAL_INPUTS, inputs[len(REQUIRED_INPUTS) :], strict=False)
        if value is not None
    }
    data = [value for value in inputs[FIRST_MASK_INPUT:] if value is not None]
    alibi = optional.get("alibi_slopes")
    attributes = node.attributes
    program = attributes.get("program")
    integers = () if program is None else tuple(program.as_ints())
    shapes = tuple(_shape(value) for value in data)
    return NodeSignature(
        program=integers,
        data_shapes=shapes,
        q_offset_mode=attributes["q_offset_mode"].as_string(),
        q_offset=attributes["q_offset"].as_int() if "q_offset" in attributes else 0,
        scale=attributes["scale"].as_float(),
        softcap=attributes["softcap"].as_float(),
        optional_inputs=frozenset(optional),
        alibi_rank=1 if alibi is None else len(_shape(alibi)),
        return_lse=len(node.outputs) > 1,
        seqlen_q=_length(inputs[0]),
        seqlen_k=_length(inputs[1]),
        facts=data_facts(parse_program(integers), shapes, [_constant(value) for value in data]),
    )


def _shape(value: ir.Value) -> tuple[int | None, ...]:
    if value.shape is None:
        raise ExportError(
            f"the rank of {value.name} is unknown after tracing; pass it to attention() as a "
            "plain tensor"
        )
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _constant(value: ir.Value) -> npt.NDArray[np.generic] | None:
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _length(value: ir.Value | None) -> int | None:
    shape = () if value is None or value.shape is None else tuple(value.shape)
    length = shape[2] if len(shape) == 4 else None
    return length if isinstance(length, int) else None
