"""A mask's program as a tree (docs/formats.md, Program)."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

from portattn.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NO_LOWER = -(2**62)
NO_UPPER = 2**62


class Opcode(enum.IntEnum):
    """Opcodes of the program."""

    ALL = 0
    BAND = 1
    KEY_RANGE = 2
    QUERY_RANGE = 3
    KEY_MODULO = 4
    DIFF_MODULO = 5
    BLOCK_BAND = 6
    KEY_SET = 7
    QUERY_SET = 8
    RANDOM_BLOCKS = 9
    BLOCK_TABLE = 10
    SEGMENTS = 11
    KEY_LENGTHS = 12
    AND = 13
    OR = 14
    NOT = 15
    PER_HEAD = 16
    PER_BATCH = 17
    DOCUMENTS = 18


# Operands of each primitive; NOT has one child, the other combinators say how many.
_OPERANDS = {
    Opcode.ALL: 0,
    Opcode.BAND: 2,
    Opcode.KEY_RANGE: 2,
    Opcode.QUERY_RANGE: 2,
    Opcode.KEY_MODULO: 3,
    Opcode.DIFF_MODULO: 3,
    Opcode.BLOCK_BAND: 3,
    Opcode.KEY_SET: 1,
    Opcode.QUERY_SET: 1,
    Opcode.RANDOM_BLOCKS: 3,
    Opcode.BLOCK_TABLE: 3,
    Opcode.SEGMENTS: 2,
    Opcode.KEY_LENGTHS: 1,
    Opcode.DOCUMENTS: 1,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Expression:
    """One node: a primitive with its operands, or a combinator with its children."""

    opcode: Opcode
    operands: tuple[int, ...] = ()
    children: tuple[Expression, ...] = ()

    def __str__(self) -> str:
        inner = ", ".join([*map(str, self.operands), *map(str, self.children)])
        return f"{self.opcode.name}({inner})"

    def walk(self) -> Iterator[Expression]:
        """This node and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


def parse_program(program: Sequence[int]) -> Expression:
    """The tree of a program; an empty program keeps everything.

    Raises:
        ExportError: another version, or an opcode that this exporter does not know.
    """
    if not program:
        return Expression(Opcode.ALL)
    if program[0] != 1:
        raise ExportError(
            f"the mask's program has version {program[0]}; this exporter knows 1. Install the "
            "portattn "
            "that made the mask"
        )
    tree, end = _parse(program, 1)
    if end != len(program):
        raise ExportError(
            f"the mask's program has {len(program) - end} values past its expression; make the "
            "mask anew"
        )
    return tree


def _parse(program: Sequence[int], at: int) -> tuple[Expression, int]:
    try:
        opcode = Opcode(program[at])
        if opcode in _OPERANDS:
            end = at + 1 + _OPERANDS[opcode]
            operands = tuple(program[at + 1 : end])
            if end > len(program):
                raise IndexError
            return Expression(opcode, operands), end
        count, at = (1, at + 1) if opcode is Opcode.NOT else (program[at + 1], at + 2)
        children = []
        for _ in range(count):
            child, at = _parse(program, at)
            children.append(child)
        return Expression(opcode, (), tuple(children)), at
    except (IndexError, ValueError) as error:
        raise ExportError(
            f"the mask's program cannot be read at position {at} of {len(program)}; the opcodes "
            "known "
            f"here end at {max(Opcode)}. Install the portattn that made the mask"
        ) from error
