"""Masks that a kernel plans by itself from a few numbers: bands, key ranges and their ANDs.

Decode kernels read each sequence's length on the device, so that no plan of the host can know it.
A row of such a mask keeps one interval of keys, which four numbers and the row's position give; a
fifth gives the first keys that streaming attention keeps beside it (Xiao et al., StreamingLLM,
2023).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from portattn.masks.opcodes import instructions

if TYPE_CHECKING:
    from collections.abc import Sequence

_ALL, _BAND, _KEY_RANGE, _AND, _OR = 0, 1, 2, 13, 14
UNBOUNDED = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class ScalarMask:
    """What the query at position i keeps: the keys j of one interval.

        max(key_begin, i + lo) <= j < min(key_end, i + hi + 1)

    All four fit int32, and +-UNBOUNDED stands for "no bound". Add a position to them in int64 and
    clamp the result to the keys that exist: the sums may leave int32, and what is clamped is exact
    as long as positions stay inside +-2**30.

    Attributes:
        lo, hi: bounds of j - i, both inclusive.
        key_begin, key_end: bounds of j, half-open.
    """

    lo: int = -UNBOUNDED
    hi: int = UNBOUNDED
    key_begin: int = 0
    key_end: int = UNBOUNDED


def scalar_mask(program: Sequence[int]) -> ScalarMask | None:
    """The four numbers of a mask program (docs/formats.md); () keeps everything.

    Returns:
        None where the mask is more than an AND of bands and key ranges.
    """
    lo, hi, key_begin, key_end = -UNBOUNDED, UNBOUNDED, 0, UNBOUNDED
    # Without OR, NOT and the like, nesting means nothing: every leaf must keep.
    for opcode, operands in instructions(program):
        if opcode == _BAND:
            lo, hi = max(lo, operands[0]), min(hi, operands[1])
        elif opcode == _KEY_RANGE:
            key_begin, key_end = max(key_begin, operands[0]), min(key_end, operands[1])
        elif opcode not in (_ALL, _AND):
            return None
    return ScalarMask(*(_clamp(bound) for bound in (lo, hi, key_begin, key_end)))


def streaming_mask(program: Sequence[int]) -> tuple[ScalarMask, int] | None:
    """`scalar_mask`, and how many first keys are kept beside its interval.

    With (mask, first_keys) the query at position i keeps the keys of the interval, and the keys
    j < first_keys that lie below the interval's end.

    Returns:
        None where the mask is neither an AND of bands and key ranges, nor an AND of such with one
        union of two such that differ in where they begin and in first_keys only.
    """
    leaves = list(instructions(program))
    at = next((k for k, (opcode, _) in enumerate(leaves) if opcode == _OR), None)
    if at is None:
        plain = scalar_mask(program)
        return None if plain is None else (plain, 0)
    if leaves[at][1] != (2,):
        return None
    middle = _end(leaves, at + 1)
    end = _end(leaves, middle)
    parts = [_reduce(part) for part in (leaves[at + 1 : middle], leaves[middle:end])]
    rest = _reduce([*leaves[:at], *leaves[end:]])
    if rest is None or rest.lo > -UNBOUNDED or rest.key_begin > 0:
        return None
    for window, first in (parts, parts[::-1]):
        if window is None or first is None:
            return None
        sees_all = first.lo == -UNBOUNDED and first.key_begin == 0 and first.hi == window.hi
        if sees_all and window.key_begin == 0 and window.key_end == UNBOUNDED:
            end_of_rest = {"hi": min(rest.hi, window.hi), "key_end": rest.key_end}
            return dataclasses.replace(window, **end_of_rest), max(0, first.key_end)
    return None


def _reduce(leaves: Sequence[tuple[int, tuple[int, ...]]]) -> ScalarMask | None:
    return scalar_mask([1, *(value for opcode, rest in leaves for value in (opcode, *rest))])


def _end(leaves: Sequence[tuple[int, tuple[int, ...]]], at: int) -> int:
    """Where the expression that starts at instruction `at` ends; of AND, OR and leaves only."""
    open_expressions = 1
    while open_expressions and at < len(leaves):
        opcode, operands = leaves[at]
        open_expressions += operands[0] - 1 if opcode in (_AND, _OR) else -1
        at += 1
    return at


def _clamp(bound: int) -> int:
    return max(-UNBOUNDED, min(bound, UNBOUNDED))
