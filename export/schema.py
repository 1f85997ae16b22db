"""The ONNX node ``com.portattn::Attention``: its inputs and attributes, and its OpSchema.

The same list stands in csrc/ort_op.cpp for ONNX Runtime; inputs and attributes are only ever
appended.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from typing import TYPE_CHECKING

import onnx
from onnx import defs

if TYPE_CHECKING:
    from collections.abc import Iterator

DOMAIN = "com.portattn"
OP_NAME = "Attention"
OP_VERSION = 1
OPSET = 23

# Input order. Q, K, V are required; an absent optional input is an empty name; mask data follows.
REQUIRED_INPUTS = ("Q", "K", "V")
OPTIONAL_INPUTS = ("q_offset_input", "kv_lengths", "alibi_slopes", "bias", "sinks")
OUTPUTS = ("Y", "LSE")
MAX_MASK_INPUTS = 64
FIRST_MASK_INPUT = len(REQUIRED_INPUTS) + len(OPTIONAL_INPUTS)

Q_OFFSET_MODES = ("value", "end", "start", "unset")
DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}
ATTRIBUTES = ("program", "q_offset", "q_offset_mode", "scale", "softcap")

_ATTRIBUTE_TYPES = {
    "program": (
        defs.OpSchema.AttrType.INTS,
        "the mask (docs/formats.md); absent keeps everything",
    ),
    "q_offset": (defs.OpSchema.AttrType.INT, "for the mode 'value', unless it is an input"),
    "q_offset_mode": (defs.OpSchema.AttrType.STRING, "'value', 'end', 'start' or 'unset'"),
    "scale": (defs.OpSchema.AttrType.FLOAT, "softmax scale; absent: head_dim ** -0.5"),
    "softcap": (defs.OpSchema.AttrType.FLOAT, "c of c*tanh(x/c); 0: none"),
}


_lock = threading.RLock()


@contextlib.contextmanager
def registered_schema() -> Iterator[None]:
    """The node's OpSchema is registered with the onnx package inside this context.

    The exporter refuses a node without one. Not longer than needed: the package refuses to load
    its reference evaluator while two domains have an operator of one name.
    """
    importlib.import_module("onnx.reference")
    with _lock:
        if defs.has(OP_NAME, DOMAIN):
            yield
            return
        defs.register_schema(_op_schema())
        try:
            yield
        finally:
            defs.deregister_schema(OP_NAME, OP_VERSION, DOMAIN)


def _op_schema() -> defs.OpSchema:
    parameter, option = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption
    reals = ["tensor(float)", "tensor(float16)"]
    lengths = ["tensor(int32)", "tensor(int64)"]
    inputs = [parameter(name, "T") for name in REQUIRED_INPUTS]
    for name in OPTIONAL_INPUTS:
        constraint = {"q_offset_input": "tensor(int64)", "kv_lengths": "I"}.get(name, f"T_{name}")
        inputs.append(parameter(name, constraint, param_option=option.Optional))
    # Optional slots instead of one variadic input: the exporter cannot leave a variadic input
    # empty.
    slots = [f"mask_data_{slot}" for slot in range(MAX_MASK_INPUTS)]
    inputs += [parameter(slot, f"T_{slot}", param_option=option.Optional) for slot in slots]
    outputs = [
        parameter("Y", "T"),
        parameter("LSE", "tensor(float)", param_option=option.Optional),
    ]
    constraints = [
        ("T", reals, "query, key, value and output"),
        ("I", lengths, "lengths"),
    ]
    constraints += [(f"T_{name}", reals, name) for name in ("alibi_slopes", "bias", "sinks")]
    constraints += [(f"T_{slot}", [*lengths, "tensor(bool)"], "mask data") for slot in slots]
    return defs.OpSchema(
        OP_NAME,
        DOMAIN,
        OP_VERSION,
        doc="Attention under a declarative mask",
        inputs=inputs,
        outputs=outputs,
        type_constraints=constraints,
        attributes=[
            defs.OpSchema.Attribute(name, kind, text, required=False)
            for name, (kind, text) in _ATTRIBUTE_TYPES.items()
        ],
    )
