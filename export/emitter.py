"""Writes the nodes of an ONNX function body; `Value` makes the Python read as the algorithm.

All integers are int64, all reals float32 and all masks bool, so that a Python int, float or bool
beside a `Value` has one meaning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Sequence

Operand: TypeAlias = "Value | int | float | bool"
Attribute: TypeAlias = int | float | str | list[int] | onnx.TensorProto


class Emitter:
    """Collects nodes in standard ops, with each constant written once.

    Attributes:
        nodes: the nodes so far, in order.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._counter = 0

    def _name(self, op_type: str) -> str:
        self._counter += 1
        return f"{op_type.lower()}_{self._counter}"

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Value:
        """A constant tensor; ints become int64, floats float32."""
        array = np.asarray(value)
        if dtype is None:
            dtype = {"i": np.int64, "f": np.float32, "b": np.bool_}[array.dtype.kind]
        array = array.astype(dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._name("Constant")
            tensor = numpy_helper.from_array(array, name)
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            self._constants[key] = Value(self, name)
        return self._constants[key]

    def value(self, operand: Operand) -> Value:
        """The operand itself, or a scalar constant."""
        return operand if isinstance(operand, Value) else self.constant(operand)

    def op(
        self, op_type: str, *inputs: Operand | None, node_name: str = "", **attributes: Attribute
    ) -> Value:
        """One node with one output; None stands for an input left out."""
        return self.ops(op_type, *inputs, count=1, node_name=node_name, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: Operand | None,
        count: int,
        node_name: str = "",
        **attributes: Attribute,
    ) -> list[Value]:
        """One node with ``count`` outputs."""
        names = ["" if operand is None else self.value(operand).name for operand in inputs]
        outputs = [self._name(op_type) for _ in range(count)]
        node = helper.make_node(op_type, names, outputs, node_name or outputs[0])
        node.attribute.extend(helper.make_attribute(name, attributes[name]) for name in attributes)
        self.nodes.append(node)
        return [Value(self, name) for name in outputs]

    def range(self, count: Operand, start: Operand = 0) -> Value:
        """int64 [count]: start, start + 1, ..."""
        first = self._scalar(start)
        return self.op("Range", first, first + self._scalar(count), 1)

    def _scalar(self, operand: Operand) -> Value:
        value = self.value(operand)
        return self.op("Reshape", value, self.constant(np.zeros(0, np.int64)))

    def shape(self, *dims: Operand) -> Value:
        """int64 [len(dims)]: a shape from ints and one-element values."""
        one = self.constant([1])
        parts = [
            self.op("Reshape", dim, one) if isinstance(dim, Value) else self.constant([dim])
            for dim in dims
        ]
        return self.op("Concat", *parts, axis=0)

    def where(self, condition: Value, then: Operand, otherwise: Operand) -> Value:
        """``then`` where the condition holds, else ``otherwise``."""
        return self.op("Where", condition, then, otherwise)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """The values side by side; one value is itself."""
        return values[0] if len(values) == 1 else self.op("Concat", *values, axis=axis)


class Value:
    """A named tensor of the body. Operators emit the ONNX node of the same meaning.

    ``//`` and ``%`` are floor division and its remainder, as in Python.
    """

    def __init__(self, emitter: Emitter, name: str) -> None:
        self.emitter = emitter
        self.name = name

    def _binary(self, op_type: str, other: Operand) -> Value:
        return self.emitter.op(op_type, self, other)

    def __add__(self, other: Operand) -> Value:
        if isinstance(other, int) and other == 0:
            return self
        return self._binary("Add", other)

    def __sub__(self, other: Operand) -> Value:
        return self._binary("Sub", other)

    def __neg__(self) -> Value:
        return self.emitter.op("Neg", self)

    def __mul__(self, other: Operand) -> Value:
        return self._binary("Mul", other)

    def __truediv__(self, other: Operand) -> Value:
        return self._binary("Div", other)

    def __mod__(self, other: Operand) -> Value:
        return self._binary("Mod", other)

    def __floordiv__(self, other: Operand) -> Value:
        # ONNX Div truncates; what is divisible is divided exactly.
        return (self - self % other)._binary("Div", other)

    def __matmul__(self, other: Value) -> Value:
        return self._binary("MatMul", other)

    def __ge__(self, other: Operand) -> Value:
        return self._binary("GreaterOrEqual", other)

    def __gt__(self, other: Operand) -> Value:
        return self._binary("Greater", other)

    def __le__(self, other: Operand) -> Value:
        return self._binary("LessOrEqual", other)

    def __lt__(self, other: Operand) -> Value:
        return self._binary("Less", other)

    def __and__(self, other: Operand) -> Value:
        return self._binary("And", other)

    def __or__(self, other: Operand) -> Value:
        return self._binary("Or", other)

    def __invert__(self) -> Value:
        return self.emitter.op("Not", self)

    def equals(self, other: Operand) -> Value:
        """Elementwise equality (``==`` stays Python's identity)."""
        return self._binary("Equal", other)

    def minimum(self, other: Operand) -> Value:
        """The smaller of the two."""
        return self._binary("Min", other)

    def maximum(self, other: Operand) -> Value:
        """The larger of the two."""
        return self._binary("Max", other)

    def dim(self, axis: int) -> Value:
        """int64 [1]: the size of one axis (not negative)."""
        return self.emitter.op("Shape", self, start=axis, end=axis + 1)

    def reshape(self, *dims: Operand) -> Value:
        """The same elements in another shape; a 0 is a length of 0."""
        return self.emitter.op("Reshape", self, self.emitter.shape(*dims), allowzero=1)

    def unsqueeze(self, *axes: int) -> Value:
        """New axes of length 1 at these places of the result."""
        return self.emitter.op("Unsqueeze", self, self.emitter.constant(list(axes)))

    def transpose(self, *perm: int) -> Value:
        """The axes in another order."""
        return self.emitter.op("Transpose", self, perm=list(perm))

    def gather(self, indices: Value, axis: int) -> Value:
        """Entries along one axis; an index outside is an error at run time."""
        return self.emitter.op("Gather", self, indices, axis=axis)

    def slice(self, begin: Operand, end: Operand, axis: int) -> Value:
        """Entries [begin, end) along one axis."""
        starts, ends = self.emitter.shape(begin), self.emitter.shape(end)
        return self.emitter.op("Slice", self, starts, ends, self.emitter.constant([axis]))

    def pad(self, before: Operand, after: Operand, axis: int) -> Value:
        """Zeros before and after, along one axis."""
        amounts = self.emitter.shape(before, after)
        return self.emitter.op("Pad", self, amounts, None, self.emitter.constant([axis]))

    def cast(self, dtype: int) -> Value:
        """The same values as another type (onnx.TensorProto.*)."""
        return self.emitter.op("Cast", self, to=dtype)

    def reduce(self, op_type: str, axis: int = -1) -> Value:
        """ReduceMax, ReduceSum, ... along one axis, which stays with length 1."""
        return self.emitter.op(op_type, self, self.emitter.constant([axis]), keepdims=1)
