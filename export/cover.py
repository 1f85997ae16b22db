"""Which keys a query block can need: what lets a function body avoid O(seqlen_q * seqlen_k).

A `Cover` says that every kept pair lies in a band of key blocks around the query's own block, or
at one of a few global keys, or in a row of a few global queries, or in a drawn block, or in the
query's residue class. It may be wider than the mask: bodies evaluate the whole predicate inside
it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from portattn.export.expression import NO_LOWER, NO_UPPER, Expression, Opcode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.export.facts import DataFacts

# Candidates for the block size; larger ones waste keys, smaller ones copy more and run small
# products.
_BLOCK_SIZES = (32, 64, 128, 256, 512)
# A key costs 1 + 18 / block: its copy serves block rows. Fitted to windows of 64 to 1024 keys at
# head_dim 64 (ONNX Runtime 1.32, one thread): within 10 % of the best block size each time.
_COPY_COST = 18.0
# Lengths that are dynamic are taken to be long: sparse masks exist for those.
LONG_SEQLEN = 65536
# Global positions given as data of unknown length.
_SET_SIZE = 64


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Positions:
    """A set of positions: ``range`` (a, b), ``modulo`` (m, a, b) or ``set`` (slot, size)."""

    kind: str
    operands: tuple[int, ...]

    def count(self, seqlen: int) -> float:
        """About how many there are below seqlen."""
        if self.kind == "modulo":
            return seqlen * (self.operands[2] - self.operands[1]) / self.operands[0]
        if self.kind == "set":
            return self.operands[1]
        return max(0, min(self.operands[1], seqlen) - max(self.operands[0], 0))


@dataclasses.dataclass(frozen=True, slots=True)
class Cover:
    """All kept pairs lie in one of these.

    Attributes:
        block: rows of a query block and keys of a key block, aligned by position.
        low, high: key block - query block; low > high: no band; NO_LOWER, NO_UPPER: unbounded.
        keys: global keys.
        queries: global queries.
        random: operands of RANDOM_BLOCKS with n == block.
        tables: block tables, as (slot, most blocks kept in a row).
        residue: pairs with (i - j) % block == 0.
    """

    block: int
    low: int
    high: int
    keys: frozenset[Positions] = frozenset()
    queries: frozenset[Positions] = frozenset()
    random: frozenset[tuple[int, ...]] = frozenset()
    tables: frozenset[tuple[int, int]] = frozenset()
    residue: bool = False

    @property
    def bounded(self) -> bool:
        """The band ends on both sides."""
        return self.low > self.high or (self.low > NO_LOWER and self.high < NO_UPPER)

    @property
    def num_band_blocks(self) -> int:
        """Key blocks of the band, for one query block."""
        return max(0, self.high - self.low + 1)

    def cost(self, seqlen_k: int) -> float:
        """Work per query row, in keys."""
        if not self.bounded:
            return float("inf")
        blocks = self.num_band_blocks + sum(operands[1] for operands in self.random)
        blocks += sum(degree for _, degree in self.tables)
        local = blocks * self.block
        rest = sum(keys.count(seqlen_k) for keys in self.keys)
        rest += sum(queries.count(seqlen_k) for queries in self.queries)
        if self.residue:
            rest += 3 * seqlen_k / self.block
        return local * (1.0 + _COPY_COST / self.block) + rest

    def intersect(self, other: Cover) -> Cover:
        """Covers what both cover: bands meet, the rest of both stays."""
        return dataclasses.replace(
            self._join(other), low=max(self.low, other.low), high=min(self.high, other.high)
        )

    def union(self, other: Cover) -> Cover:
        """Covers what either covers."""
        bands = [cover for cover in (self, other) if cover.low <= cover.high]
        low = min((cover.low for cover in bands), default=1)
        high = max((cover.high for cover in bands), default=0)
        return dataclasses.replace(self._join(other), low=low, high=high)

    def _join(self, other: Cover) -> Cover:
        return dataclasses.replace(
            self,
            keys=self.keys | other.keys,
            queries=self.queries | other.queries,
            random=self.random | other.random,
            tables=self.tables | other.tables,
            residue=self.residue or other.residue,
        )


def choose_cover(expression: Expression, facts: DataFacts, seqlen_k: int | None) -> Cover | None:
    """The cheapest cover of an expression, or None if a dense body costs less.

    Args:
        expression: the mask.
        facts: what is known of the mask's data.
        seqlen_k: the number of keys if it is fixed.
    """
    length = LONG_SEQLEN if seqlen_k is None else seqlen_k
    drawn = {node.operands[0] for node in expression.walk() if node.opcode is Opcode.RANDOM_BLOCKS}
    strides = {
        node.operands[0]
        for node in expression.walk()
        if node.opcode is Opcode.DIFF_MODULO and node.operands[1:] == (0, 1)
    }
    tables = {node.operands[1] for node in expression.walk() if node.opcode is Opcode.BLOCK_TABLE}
    sizes = sorted({*_BLOCK_SIZES, *drawn, *strides, *tables})
    covers = [_cover(expression, size, facts, length, False) for size in sizes]
    best = min(covers, key=lambda cover: cover.cost(length))
    return best if best.cost(length) < length else None


def _cover(node: Expression, block: int, facts: DataFacts, length: int, negated: bool) -> Cover:
    everything = Cover(block, NO_LOWER, NO_UPPER)
    opcode = node.opcode
    if opcode is Opcode.NOT:
        return _cover(node.children[0], block, facts, length, not negated)
    if node.children:
        children = [_cover(child, block, facts, length, negated) for child in node.children]
        if opcode is (Opcode.OR if negated else Opcode.AND):
            return _intersection(children, length)
        cover = children[0]
        for child in children[1:]:
            cover = cover.union(child)
        return cover
    if negated:
        return _negated_cover(node, block)
    found = _band_cover(node, block) or _position_cover(node, block, facts)
    return found or _data_cover(node, block, facts) or everything


def _band_cover(node: Expression, block: int) -> Cover | None:
    """Of a primitive that relates key and query blocks; None for others and where it has none."""
    match node.opcode:
        case Opcode.BAND:
            return Cover(block, *_block_offsets(node.operands[0], node.operands[1], block))
        case Opcode.BLOCK_BAND:
            return Cover(block, *_block_band(node.operands, block))
        case Opcode.RANDOM_BLOCKS if node.operands[0] == block:
            return _empty(block, random=frozenset({node.operands}))
        case Opcode.DIFF_MODULO if node.operands == (block, 0, 1):
            return _empty(block, residue=True)
        case _:
            return None


def _position_cover(node: Expression, block: int, facts: DataFacts) -> Cover | None:
    """Of a primitive that names few keys or few queries; None for others."""
    match node.opcode:
        case Opcode.KEY_RANGE if node.operands[1] < NO_UPPER:
            return _empty(block, keys=frozenset({Positions("range", node.operands)}))
        case Opcode.KEY_MODULO:
            return _empty(block, keys=frozenset({Positions("modulo", node.operands)}))
        case Opcode.KEY_SET:
            return _empty(block, keys=frozenset({_position_set(node, facts)}))
        case Opcode.QUERY_RANGE if node.operands[0] > NO_LOWER and node.operands[1] < NO_UPPER:
            return _empty(block, queries=frozenset({Positions("range", node.operands)}))
        case Opcode.QUERY_SET:
            return _empty(block, queries=frozenset({_position_set(node, facts)}))
        case _:
            return None


def _data_cover(node: Expression, block: int, facts: DataFacts) -> Cover | None:
    """Of a primitive whose constant data keeps few blocks or near keys; None for others."""
    if node.opcode is Opcode.BLOCK_TABLE and node.operands[1:] == (block, block):
        slot = node.operands[0]
        degree = facts.table_degrees[slot] if slot < len(facts.table_degrees) else None
        return None if degree is None else _empty(block, tables=frozenset({(slot, degree)}))
    if node.opcode in (Opcode.SEGMENTS, Opcode.DOCUMENTS):
        for *slots, low, high in facts.segment_bands:
            if tuple(slots) == node.operands and low <= high:
                return Cover(block, *_block_offsets(low, high, block))
    return None


def _negated_cover(node: Expression, block: int) -> Cover:
    low, high = NO_LOWER, NO_UPPER
    if node.opcode is Opcode.ALL:
        return _empty(block)
    if node.opcode is Opcode.BAND and node.operands[0] <= NO_LOWER:
        low, high = node.operands[1] + 1, NO_UPPER
    elif node.opcode is Opcode.BAND and node.operands[1] >= NO_UPPER:
        low, high = NO_LOWER, node.operands[0] - 1
    elif node.opcode is Opcode.KEY_RANGE and node.operands[1] >= NO_UPPER:
        return _empty(block, keys=frozenset({Positions("range", (0, node.operands[0]))}))
    return Cover(block, *_block_offsets(low, high, block))


def _empty(
    block: int,
    *,
    keys: frozenset[Positions] = frozenset(),
    queries: frozenset[Positions] = frozenset(),
    random: frozenset[tuple[int, ...]] = frozenset(),
    tables: frozenset[tuple[int, int]] = frozenset(),
    residue: bool = False,
) -> Cover:
    return Cover(block, 1, 0, keys, queries, random, tables, residue)


def _intersection(children: Sequence[Cover], length: int) -> Cover:
    # Any child alone covers the AND; so do two together with their bands cut. Greedy over the
    # children, cheapest first, which finds the half bands of "causal and at most n back" too.
    block = children[0].block
    best = min(children, key=lambda cover: cover.cost(length))
    for child in children:
        met = best.intersect(child)
        pure = child == dataclasses.replace(_empty(block), low=child.low, high=child.high)
        if pure or met.cost(length) < best.cost(length):
            best = met
    return best


def _position_set(node: Expression, facts: DataFacts) -> Positions:
    slot = node.operands[0]
    size = facts.set_sizes[slot] if slot < len(facts.set_sizes) else None
    return Positions("set", (slot, _SET_SIZE if size is None else size))


def _block_offsets(low: int, high: int, block: int) -> tuple[int, int]:
    """Bounds of j // block - i // block where low <= j - i <= high."""
    first = NO_LOWER if low <= NO_LOWER else -((block - 1 - low) // block)
    last = NO_UPPER if high >= NO_UPPER else (high + block - 1) // block
    return first, last


def _block_band(operands: tuple[int, ...], block: int) -> tuple[int, int]:
    size, low, high = operands
    # Blocks that divide n keep its borders; others take the hull of the positions.
    unit, each = (block, size // block) if size % block == 0 else (1, size)
    first = NO_LOWER if low <= NO_LOWER else low * each - (each - 1)
    last = NO_UPPER if high >= NO_UPPER else high * each + each - 1
    if unit == block:
        return first, last
    return _block_offsets(first, last, block)
