"""Reading masks back: from a program with its data, from JSON."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, TypeAlias

import torch

from portattn.errors import MaskError
from portattn.masks import json_format
from portattn.masks.base import MAX_DEPTH, VERSION
from portattn.masks.mask import All, And, Mask, Not, Or, all_of, any_of
from portattn.masks.packed import Documents
from portattn.masks.primitives import (
    Band,
    BlockBand,
    DiffModulo,
    KeyModulo,
    KeyRange,
    QueryRange,
    RandomBlocks,
)
from portattn.masks.selection import PerBatch, PerHead
from portattn.masks.tables import BlockTable, KeyLengths, KeySet, QuerySet, Segments, is_rising
from portattn.masks.tensors import NO_LOWER, NO_UPPER, check_int, freeze

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_PROGRAM_LEN = 2**16

Operand: TypeAlias = int | torch.Tensor | None

# What each operand of an opcode is: "int", "low" and "high" (bounds that may be absent), the dtype
# of the slot that it names, or "sorted" for a slot of sorted positions. The constructor takes them
# in this order.
_LEAVES: dict[int, tuple[Callable[..., Mask], tuple[str | torch.dtype, ...]]] = {
    All.opcode: (All, ()),
    Band.opcode: (Band, ("low", "high")),
    KeyRange.opcode: (KeyRange, ("low", "high")),
    QueryRange.opcode: (QueryRange, ("low", "high")),
    KeyModulo.opcode: (KeyModulo, ("int", "int", "int")),
    DiffModulo.opcode: (DiffModulo, ("int", "int", "int")),
    BlockBand.opcode: (BlockBand, ("int", "low", "high")),
    KeySet.opcode: (KeySet, ("sorted",)),
    QuerySet.opcode: (QuerySet, ("sorted",)),
    RandomBlocks.opcode: (RandomBlocks, ("int", "int", "int")),
    BlockTable.opcode: (BlockTable, (torch.bool, "int", "int")),
    Segments.opcode: (Segments, (torch.int32, torch.int32)),
    KeyLengths.opcode: (KeyLengths, (torch.int64,)),
    Documents.opcode: (Documents, (torch.int64,)),
}
_LISTS: dict[int, Callable[[tuple[Mask, ...]], Mask]] = {
    And.opcode: all_of,
    Or.opcode: any_of,
    PerHead.opcode: PerHead,
    PerBatch.opcode: PerBatch,
}


def from_program(program: Sequence[int], data: Sequence[torch.Tensor] = ()) -> Mask:
    """The mask that a program describes; everything is checked, nothing trusted.

    Args:
        program: integers as in docs/formats.md.
        data: the tensors that its slots name, with the dtypes given there. Tensors of an existing
            mask are taken as they are; others are copied.

    Raises:
        MaskError: malformed in any way; the message says where.
    """
    try:
        values = tuple(program)
    except TypeError as error:
        raise MaskError(
            f"program is {type(program).__name__}; it must be a list of ints"
        ) from error
    if not data and all(type(value) is int for value in values):
        return _without_data(values)
    return _decode(values, tuple(data))


def from_json(text: str | bytes, *, max_bytes: int = json_format.MAX_JSON_BYTES) -> Mask:
    """The mask that `Mask.to_json` wrote.

    Args:
        text: the JSON text; it need not be trusted.
        max_bytes: longer text, or data of more elements, is refused.

    Raises:
        MaskError: malformed, of another version, or too large.
    """
    return from_program(*json_format.load(text, max_bytes))


@functools.lru_cache(maxsize=1024)
def _without_data(program: tuple[int, ...]) -> Mask:
    return _decode(program, ())


def _decode(program: tuple[int, ...], data: tuple[torch.Tensor, ...]) -> Mask:
    if not 2 <= len(program) <= MAX_PROGRAM_LEN:
        raise MaskError(
            f"program has {len(program)} values; it must have 2 to {MAX_PROGRAM_LEN}: "
            "a version, then an expression"
        )
    if program[0] != VERSION:
        raise MaskError(
            f"program has version {program[0]!r}; this portattn reads {VERSION}: "
            "encode it again, or update portattn"
        )
    reader = _Reader(program, data)
    mask = reader.expression(1)
    if reader.position != len(program):
        raise MaskError(
            f"program ends at {reader.position}, but has {len(program)} values; "
            "remove what follows the expression"
        )
    unused = sorted(set(range(len(data))) - reader.used)
    if unused:
        raise MaskError(f"data[{unused[0]}] is named by no slot of the program; leave it out")
    return mask


@dataclasses.dataclass
class _Reader:
    program: tuple[int, ...]
    data: tuple[torch.Tensor, ...]
    position: int = 1
    used: set[int] = dataclasses.field(default_factory=set)

    def expression(self, depth: int) -> Mask:
        start = self.position
        if depth > MAX_DEPTH:
            raise MaskError(f"program nests deeper than {MAX_DEPTH} at {start}; flatten it")
        opcode = self._next("an opcode", 0, 2**31)
        if opcode in _LEAVES:
            build, kinds = _LEAVES[opcode]
            arguments = [self._operand(kind) for kind in kinds]
            return self._build(start, build, *arguments)
        if opcode == Not.opcode:
            operand = self.expression(depth + 1)
            return self._build(start, lambda: ~operand)
        if opcode in _LISTS:
            count = self._next("a number of operands", 1, len(self.program) - self.position)
            operands = tuple(self.expression(depth + 1) for _ in range(count))
            return self._build(start, _LISTS[opcode], operands)
        raise MaskError(
            f"program has unknown opcode {opcode} at {start}; this portattn knows 0 to "
            f"{Documents.opcode}: a newer version may have written it"
        )

    def _next(self, what: str, low: int, high: int) -> int:
        if self.position >= len(self.program):
            raise MaskError(f"program ends at {self.position}, where {what} is needed")
        value = check_int(
            f"program[{self.position}] ({what})", self.program[self.position], low, high
        )
        self.position += 1
        return value

    def _operand(self, kind: str | torch.dtype) -> Operand:
        if isinstance(kind, torch.dtype):
            return self._slot(kind)
        if kind == "sorted":
            positions = freeze("positions", self._slot(torch.int64), torch.int64, (1,))
            if not is_rising(positions.numpy()):
                raise MaskError(
                    f"program[{self.position - 1}] names unsorted or repeated positions; "
                    "sort them: the planner relies on it"
                )
            return positions
        value = self._next("an operand", -(2**63), 2**63 - 1)
        if (kind == "low" and value == NO_LOWER) or (kind == "high" and value == NO_UPPER):
            return None
        return value

    def _slot(self, dtype: torch.dtype) -> torch.Tensor:
        slot = self._next("a slot", -(2**63), 2**63 - 1)
        if not 0 <= slot < len(self.data):
            raise MaskError(
                f"program[{self.position - 1}] names slot {slot}, but data has {len(self.data)} "
                "tensors; pass the data that belong to the program"
            )
        tensor = self.data[slot]
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise MaskError(f"data[{slot}] is {found}; the program needs a tensor of {dtype}")
        self.used.add(slot)
        return tensor

    def _build(
        self, start: int, build: Callable[..., Mask], *arguments: Operand | tuple[Mask, ...]
    ) -> Mask:
        try:
            return build(*arguments)
        except MaskError as error:
            raise MaskError(f"program at {start}: {error}") from error
