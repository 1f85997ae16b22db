"""Walking a program without building its mask (docs/formats.md, "Program")."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
DOCUMENTS = 18

# Operands of each opcode that are not expressions.
_OPERANDS = (0, 2, 2, 2, 3, 3, 3, 1, 1, 3, 3, 2, 1, 1, 1, 0, 1, 1, 1)
_MAX_BOUND = 2**61  # bounds past this stand for "none"


def instructions(program: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(opcode, operands) in the program's order; () is an empty program.

    Raises:
        ValueError: an opcode of a newer format.
    """
    at = 1  # program[0] is the format's version
    while at < len(program):
        opcode = program[at]
        if not 0 <= opcode < len(_OPERANDS):
            raise ValueError(f"opcode {opcode} is of a newer format")
        end = at + 1 + _OPERANDS[opcode]
        yield opcode, tuple(program[at + 1 : end])
        at = end


def is_bound(value: int) -> bool:
    """Whether an operand of BAND or BLOCK_BAND is a bound and not "none"."""
    return abs(value) < _MAX_BOUND


def block_sizes(program: Sequence[int]) -> tuple[int, int] | None:
    """(rows, keys) of the smallest blocks that the mask is made of; None if it has none."""
    sizes: list[tuple[int, int]] = []
    for opcode, operands in instructions(program):
        if opcode in (BLOCK_BAND, RANDOM_BLOCKS):
            sizes.append((operands[0], operands[0]))
        elif opcode == BLOCK_TABLE:
            sizes.append((operands[1], operands[2]))
    if not sizes:
        return None
    return min(rows for rows, _ in sizes), min(keys for _, keys in sizes)
