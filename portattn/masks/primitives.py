"""Primitives without data: bands, ranges, residues, blocks.

i is the query's position and j the key's; // and mod are floor, as in Python.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from portattn.masks.drawing import drawn_blocks
from portattn.masks.mask import Mask
from portattn.masks.tensors import NO_LOWER, NO_UPPER, check_bounds, check_int

if TYPE_CHECKING:
    from portattn.masks.base import Kept, Positions, Where

_MAX = NO_UPPER - 1


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Primitive(Mask):
    """A mask that is an opcode and integers."""

    def _operands(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _encode(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        return (self.opcode, *self._operands())

    def __str__(self) -> str:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return f"{type(self).__name__}({', '.join(str(value) for value in values)})"


def _low(bound: int | None) -> int:
    return NO_LOWER if bound is None else bound


def _high(bound: int | None) -> int:
    return NO_UPPER if bound is None else bound


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Band(_Primitive):
    """lo <= j - i <= hi; None is no bound.

    ``Band(None, 0)`` is causal; ``Band(-left, right)`` is flash-attn's window_size.
    """

    lo: int | None
    hi: int | None
    opcode = 1

    def __post_init__(self) -> None:
        check_bounds("Band", self.lo, self.hi)
        self._set_primitive(depends_on_query=True)

    def _operands(self) -> tuple[int, ...]:
        return check_bounds("Band", self.lo, self.hi)

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        return (_low(self.lo) <= j - i) & (j - i <= _high(self.hi))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KeyRange(_Primitive):
    """a <= j < b; None is no bound."""

    a: int | None
    b: int | None
    opcode = 2

    def __post_init__(self) -> None:
        self._set_primitive(depends_on_query=False)

    def _operands(self) -> tuple[int, ...]:
        return check_bounds("KeyRange", self.a, self.b)

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        return (_low(self.a) <= j) & (j < _high(self.b))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QueryRange(_Primitive):
    """a <= i < b; None is no bound."""

    a: int | None
    b: int | None
    opcode = 3

    def __post_init__(self) -> None:
        self._set_primitive(depends_on_query=True)

    def _operands(self) -> tuple[int, ...]:
        return check_bounds("QueryRange", self.a, self.b)

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        return (_low(self.a) <= i) & (i < _high(self.b))


def _check_residues(name: str, m: int, a: int, b: int) -> tuple[int, int, int]:
    check_int(f"{name}'s modulus m", m, 1, _MAX)
    check_int(f"{name}'s lower residue a", a, 0, m, "Residues lie in [0, m)")
    check_int(f"{name}'s upper residue b", b, a, m, "It must be a <= b <= m; b is exclusive")
    return int(m), int(a), int(b)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KeyModulo(_Primitive):
    """a <= j mod m < b, with 0 <= a <= b <= m."""

    m: int
    a: int
    b: int
    opcode = 4

    def __post_init__(self) -> None:
        self._set_primitive(depends_on_query=False)

    def _operands(self) -> tuple[int, ...]:
        return _check_residues("KeyModulo", self.m, self.a, self.b)

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        return (self.a <= j % self.m) & (j % self.m < self.b)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DiffModulo(_Primitive):
    """a <= (i - j) mod m < b, with 0 <= a <= b <= m; mod is floor, as in Python."""

    m: int
    a: int
    b: int
    opcode = 5

    def __post_init__(self) -> None:
        self._set_primitive(depends_on_query=True)

    def _operands(self) -> tuple[int, ...]:
        return _check_residues("DiffModulo", self.m, self.a, self.b)

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        return (self.a <= (i - j) % self.m) & ((i - j) % self.m < self.b)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockBand(_Primitive):
    """lo <= j//n - i//n <= hi, in blocks of n; None is no bound; // is floor."""

    n: int
    lo: int | None
    hi: int | None
    opcode = 6

    def __post_init__(self) -> None:
        self._set_primitive(depends_on_query=True)

    def _operands(self) -> tuple[int, ...]:
        bounds = check_bounds("BlockBand", self.lo, self.hi)
        return (check_int("BlockBand's block size n", self.n, 1, _MAX), *bounds)

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        distance = j // self.n - i // self.n
        return (_low(self.lo) <= distance) & (distance <= _high(self.hi))


def SameBlock(n: int) -> BlockBand:  # noqa: N802  (reads as the primitive that it is)
    """j//n == i//n: query and key lie in the same block of n positions."""
    return BlockBand(n, 0, 0)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RandomBlocks(_Primitive):
    """j//n is among the ``count`` key blocks drawn for query block i//n.

    Blocks are drawn without repetition out of ceil(seqlen_k / n) by a counter-based hash that is
    specified bit for bit in docs/formats.md; all of them if there are no more than ``count``.
    Another seqlen_k is another draw.

    Attributes:
        n: positions in a block.
        count: key blocks for each query block.
        seed: 0 <= seed < 2**63.
    """

    n: int
    count: int
    seed: int
    opcode = 9

    def __post_init__(self) -> None:
        self._set_primitive(depends_on_query=True)

    def _operands(self) -> tuple[int, ...]:
        return (
            check_int("RandomBlocks' block size n", self.n, 1, _MAX),
            check_int("RandomBlocks' count", self.count, 0, 2**31 - 1),
            check_int("RandomBlocks' seed", self.seed, 0, 2**63 - 1),
        )

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        blocks, row = np.unique(i // self.n, return_inverse=True)
        num_key_blocks = -(-where.seqlen_k // self.n)
        drawn = drawn_blocks(blocks, num_key_blocks, self.count, self.seed)
        return drawn[row.reshape(i.shape), j // self.n]
