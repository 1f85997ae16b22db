"""The model-local function of one Attention node: the same result in standard ONNX ops.

Its body is specialised to the node (mask, terms, modes) and general in batch and lengths. A mask
with a cover (cover.py) becomes a gathered body, others a dense one.
"""

from __future__ import annotations

import dataclasses
import hashlib

import onnx
from onnx import TensorProto, helper

from portattn.errors import ExportError
from portattn.export.body_dense import dense_body
from portattn.export.body_gathered import gathered_body
from portattn.export.cover import Cover, choose_cover
from portattn.export.emitter import Emitter, Value
from portattn.export.expression import NO_LOWER, NO_UPPER, Expression, Opcode, parse_program
from portattn.export.facts import DataFacts
from portattn.export.predicates import MaskData, PredicateWriter
from portattn.export.schema import (
    ATTRIBUTES,
    DOMAIN,
    OP_NAME,
    OPSET,
    OPTIONAL_INPUTS,
    OUTPUTS,
    REQUIRED_INPUTS,
)
from portattn.export.scores import BodyInputs, Scorer, floats, scaled


@dataclasses.dataclass(frozen=True, slots=True)
class NodeSignature:
    """What a function body depends on.

    Attributes:
        program: the mask's program; () keeps everything.
        data_shapes: shape of each mask-data input; None where it is dynamic.
        q_offset_mode: "value", "end", "start" or "unset".
        q_offset: for the mode "value" without an input.
        scale: softmax scale.
        softcap: 0 for none.
        optional_inputs: the names in OPTIONAL_INPUTS that the node has.
        alibi_rank: 1 or 2.
        return_lse: the node has its second output.
        seqlen_q, seqlen_k: None where dynamic.
        facts: what is known of the mask's data.
    """

    program: tuple[int, ...]
    data_shapes: tuple[tuple[int | None, ...], ...]
    q_offset_mode: str
    q_offset: int
    scale: float
    softcap: float
    optional_inputs: frozenset[str] = frozenset()
    alibi_rank: int = 1
    return_lse: bool = False
    seqlen_q: int | None = None
    seqlen_k: int | None = None
    facts: DataFacts = dataclasses.field(default_factory=DataFacts)

    @property
    def overload(self) -> str:
        """A name for the body: equal signatures share one function of the model."""
        fields = dataclasses.asdict(self)
        fields["optional_inputs"] = sorted(self.optional_inputs)
        return hashlib.sha256(repr(fields).encode()).hexdigest()[:16]

    @property
    def cover(self) -> Cover | None:
        """How the body avoids computing every score; None: it does not."""
        if "kv_lengths" in self.optional_inputs:
            # Every batch element has its own positions: no common blocks. Meant for few queries.
            return None
        return choose_cover(parse_program(self.program), self.facts, self.seqlen_k)


def depends_on_position(expression: Expression, alibi: bool) -> bool:
    """Whether the query positions matter."""
    free = {Opcode.ALL, Opcode.KEY_RANGE, Opcode.KEY_MODULO, Opcode.KEY_SET, Opcode.KEY_LENGTHS}
    combine = {Opcode.AND, Opcode.OR, Opcode.NOT, Opcode.PER_HEAD, Opcode.PER_BATCH}
    endless = Expression(Opcode.BAND, (NO_LOWER, NO_UPPER))
    return alibi or any(
        node.opcode not in free | combine and node != endless for node in expression.walk()
    )


def build_function(signature: NodeSignature) -> onnx.FunctionProto:
    """The function of a node.

    Raises:
        ExportError: the mask cannot be written in standard ops.
    """
    emitter = Emitter()
    names = [*REQUIRED_INPUTS, *OPTIONAL_INPUTS]
    data_names = [f"mask_data_{slot}" for slot in range(len(signature.data_shapes))]
    expression = parse_program(signature.program)
    _check_data(expression, signature)
    given = {
        name: Value(emitter, name) if name in signature.optional_inputs else None
        for name in OPTIONAL_INPUTS
    }
    inputs = _body_inputs(emitter, signature, expression, given)
    data = [
        MaskData(Value(emitter, name), shape)
        for name, shape in zip(data_names, signature.data_shapes, strict=True)
    ]
    scorer = Scorer(emitter, inputs, expression, PredicateWriter(emitter, data))
    cover = signature.cover
    output, lse = dense_body(scorer) if cover is None else gathered_body(scorer, cover)
    emitter.nodes.append(helper.make_node("CastLike", [output.name, "Q"], [OUTPUTS[0]]))
    if lse is not None:
        emitter.nodes.append(helper.make_node("Identity", [lse.name], [OUTPUTS[1]]))
    function = helper.make_function(
        DOMAIN,
        OP_NAME,
        [*names, *data_names],
        list(OUTPUTS if signature.return_lse else OUTPUTS[:1]),
        emitter.nodes,
        [helper.make_opsetid("", OPSET)],
        attributes=list(ATTRIBUTES),
    )
    function.overload = signature.overload
    function.doc_string = f"{expression}; {'dense' if cover is None else cover}"
    return function


def _check_data(expression: Expression, signature: NodeSignature) -> None:
    slots = {
        Opcode.KEY_SET: 1,
        Opcode.QUERY_SET: 1,
        Opcode.BLOCK_TABLE: 1,
        Opcode.SEGMENTS: 2,
        Opcode.KEY_LENGTHS: 1,
        Opcode.DOCUMENTS: 1,
    }
    for node in expression.walk():
        for slot in node.operands[: slots.get(node.opcode, 0)]:
            if not 0 <= slot < len(signature.data_shapes):
                raise ExportError(
                    f"the mask's {node.opcode.name} names data slot {slot}, but the node has "
                    f"{len(signature.data_shapes)} data tensors; pass mask.data with mask.program"
                )


def _body_inputs(
    emitter: Emitter,
    signature: NodeSignature,
    expression: Expression,
    given: dict[str, Value | None],
) -> BodyInputs:
    query, key, value = (Value(emitter, name) for name in REQUIRED_INPUTS)
    alibi, bias, sinks = given["alibi_slopes"], given["bias"], given["sinks"]
    kv_lengths = given["kv_lengths"]
    scaled_query, key, value = scaled(query, signature.scale), floats(key), floats(value)
    if kv_lengths is not None:
        kv_lengths = kv_lengths.cast(TensorProto.INT64).unsqueeze(1, 2, 3)
        q_offset = kv_lengths - query.dim(2)
        # What lies past a length may be anything; as 0 it reaches nothing through a weight of 0.
        exists = emitter.range(key.dim(2)).unsqueeze(1) < kv_lengths
        key, value = emitter.where(exists, key, 0.0), emitter.where(exists, value, 0.0)
    else:
        q_offset = _q_offset(emitter, signature, expression, given["q_offset_input"])
    return BodyInputs(
        query=scaled_query,
        key=key,
        value=value,
        q_offset=q_offset,
        kv_lengths=kv_lengths,
        alibi_slopes=None if alibi is None else floats(alibi),
        alibi_rank=signature.alibi_rank,
        bias=None if bias is None else floats(bias),
        sinks=None if sinks is None else floats(sinks),
        softcap=signature.softcap,
        return_lse=signature.return_lse,
    )


def _q_offset(
    emitter: Emitter, signature: NodeSignature, expression: Expression, given: Value | None
) -> Value:
    """int64 [1]: the key position of query row 0."""
    difference = Value(emitter, "K").dim(2) - Value(emitter, "Q").dim(2)
    mode = signature.q_offset_mode
    if mode == "end":
        return difference
    if mode == "value" and given is not None:
        return given.cast(TensorProto.INT64).reshape(1)
    if mode == "value":
        return emitter.constant([signature.q_offset])
    zero = emitter.constant([0])
    if mode == "unset" and depends_on_position(
        expression, "alibi_slopes" in signature.optional_inputs
    ):
        # Only the index 0 exists: other lengths stop here, with this node's name in the message.
        return emitter.op(
            "Gather",
            zero,
            emitter.op("Abs", difference),
            node_name="portattn_needs_q_offset_because_seqlen_q_and_seqlen_k_differ",
        )
    return zero
