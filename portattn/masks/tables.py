"""Primitives with data: sets of positions, block tables, segments and lengths.

Data go by position, not by row: query row r of a call reads entry q_offset + r.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from portattn.errors import MaskError
from portattn.masks.mask import Mask
from portattn.masks.tensors import NO_UPPER, check_int, digest, freeze

if TYPE_CHECKING:
    from portattn.masks.base import Kept, Positions, Where
    from portattn.masks.tensors import TensorLike

_MAX = NO_UPPER - 1


def _position_set(name: str, positions: TensorLike) -> torch.Tensor:
    tensor = freeze(f"{name}'s positions", positions, torch.int64, (1,))
    values = tensor.numpy()
    if values.size and values.min() < 0:
        raise MaskError(
            f"{name}'s positions hold {values.min()}; positions are >= 0: "
            "count from the start of the sequence"
        )
    if is_rising(values):
        return tensor
    return freeze(f"{name}'s positions", np.unique(values), torch.int64, (1,))


def is_rising(values: npt.NDArray[np.int64]) -> bool:
    """Whether the values are sorted and unique."""
    return bool((values[1:] > values[:-1]).all())


def describe(tensor: torch.Tensor) -> str:
    """The values of a short list, the shape of anything else."""
    if tensor.ndim == 1 and tensor.numel() <= 8:
        return str(tensor.tolist())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"<{dtype} {list(tensor.shape)}>"


def positions_inside(what: str, size: int, positions: Positions) -> Positions:
    """The positions, checked to lie inside data of ``size`` positions."""
    if positions.size:
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= size:
            raise MaskError(
                f"{what} covers the positions [0, {size}), but [{low}, {high}] are asked of it; "
                "make it larger, or choose q_offset so that the queries lie inside"
            )
    return positions


def _entry(what: str, dimension: str, size: int, index: int) -> int:
    if not 0 <= index < size:
        raise MaskError(
            f"{what} has {size} entries along {dimension}, but entry {index} is asked of it; "
            f"make it for the {dimension} of the call, or leave that dimension out"
        )
    return index


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KeySet(Mask):
    """j is one of ``positions``: integers >= 0 in any order, repeated or not."""

    positions: TensorLike
    opcode = 7

    def __post_init__(self) -> None:
        positions = _position_set("KeySet", self.positions)
        self._set(positions=positions)
        self._set_primitive(
            depends_on_query=False, data=(positions,), digests=(digest(positions),)
        )

    def _encode(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        return (self.opcode, slots[0])

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        return np.isin(j, self.data[0].numpy())

    def __str__(self) -> str:
        return f"KeySet({describe(self.data[0])})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuerySet(Mask):
    """i is one of ``positions``: integers >= 0 in any order, repeated or not."""

    positions: TensorLike
    opcode = 8

    def __post_init__(self) -> None:
        positions = _position_set("QuerySet", self.positions)
        self._set(positions=positions)
        self._set_primitive(depends_on_query=True, data=(positions,), digests=(digest(positions),))

    def _encode(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        return (self.opcode, slots[0])

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        return np.isin(i, self.data[0].numpy())

    def __str__(self) -> str:
        return f"QuerySet({describe(self.data[0])})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockTable(Mask):
    """table[i//block_q, j//block_k].

    Attributes:
        table: bool [nq, nk], [num_heads, nq, nk] or [batch, 1 or num_heads, nq, nk]. It must cover
            every position of the call, or the call raises MaskError.
        block_q: query positions per row of the table.
        block_k: key positions per column.
    """

    table: TensorLike
    block_q: int
    block_k: int
    opcode = 10

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            self._set(**{name: check_int(f"BlockTable's {name}", getattr(self, name), 1, _MAX)})
        table = freeze("BlockTable's table", self.table, torch.bool, (2, 3, 4))
        if table.ndim > 2 and 0 in table.shape[:-2]:
            raise MaskError(
                f"BlockTable's table has shape {list(table.shape)}; it must have at least one "
                "batch and head: leave the leading dimensions out where nothing depends on them"
            )
        heads = table.shape[-3] if table.ndim >= 3 else 1
        self._set(table=table)
        self._set_primitive(
            depends_on_query=True,
            data=(table,),
            digests=(digest(table),),
            batch=table.shape[0] if table.ndim == 4 else None,
            num_heads=None if table.ndim == 2 or (table.ndim == 4 and heads == 1) else heads,
        )

    def _encode(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        return (self.opcode, slots[0], self.block_q, self.block_k)

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        table = self.data[0].numpy()
        if table.ndim == 4:
            table = table[_entry("BlockTable's table", "batch", table.shape[0], where.b)]
        if table.ndim == 3:
            head = 0 if self.num_heads is None else where.h
            table = table[_entry("BlockTable's table", "num_heads", table.shape[0], head)]
        rows = (
            positions_inside("BlockTable's table (queries)", table.shape[0] * self.block_q, i)
            // self.block_q
        )
        keys = (
            positions_inside("BlockTable's table (keys)", table.shape[1] * self.block_k, j)
            // self.block_k
        )
        kept: Kept = table[rows, keys]
        return kept

    def __str__(self) -> str:
        return f"BlockTable({describe(self.data[0])}, {self.block_q}, {self.block_k})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Segments(Mask):
    """q_ids[i] == k_ids[j]: query and key carry the same id.

    Attributes:
        q_ids: ids that fit int32, [positions] or [batch, positions]; they cover every query
            position.
        k_ids: the same for the keys; None takes q_ids.
    """

    q_ids: TensorLike
    k_ids: TensorLike | None = None
    opcode = 11

    def __post_init__(self) -> None:
        q_ids = freeze("Segments' q_ids", self.q_ids, torch.int32, (1, 2))
        k_ids = q_ids
        if self.k_ids is not None:
            k_ids = freeze("Segments' k_ids", self.k_ids, torch.int32, (1, 2))
        batches = {int(ids.shape[0]) for ids in (q_ids, k_ids) if ids.ndim == 2}
        if len(batches) > 1 or 0 in batches:
            raise MaskError(
                f"Segments' q_ids and k_ids have shapes {list(q_ids.shape)} and "
                f"{list(k_ids.shape)}; they must have the same batch, at least 1: give both "
                "[batch, positions], or leave the batch out of one"
            )
        digests = (digest(q_ids), digest(k_ids))
        same = digests[0] == digests[1]
        self._set(q_ids=q_ids, k_ids=q_ids if same else k_ids)
        self._set_primitive(
            depends_on_query=True,
            data=(q_ids,) if same else (q_ids, k_ids),
            digests=digests[:1] if same else digests,
            batch=batches.pop() if batches else None,
        )

    def _encode(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        return (self.opcode, slots[0], slots[-1])

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        kept: Kept = self._ids("q_ids", 0, i, where) == self._ids("k_ids", -1, j, where)
        return kept

    def _ids(self, name: str, slot: int, positions: Positions, where: Where) -> Positions:
        ids = self.data[slot].numpy()
        if ids.ndim == 2:
            ids = ids[_entry(f"Segments' {name}", "batch", ids.shape[0], where.b)]
        picked: Positions = ids[positions_inside(f"Segments' {name}", ids.shape[0], positions)]
        return picked

    def __str__(self) -> str:
        return f"Segments({', '.join(describe(tensor) for tensor in self.data)})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KeyLengths(Mask):
    """j < lengths[b]: batch b has that many keys.

    Attributes:
        lengths: integers >= 0, [batch]; a length above seqlen_k keeps every key.
    """

    lengths: TensorLike
    opcode = 12

    def __post_init__(self) -> None:
        lengths = freeze("KeyLengths' lengths", self.lengths, torch.int64, (1,))
        if lengths.numel() == 0 or lengths.numpy().min() < 0:
            raise MaskError(
                f"KeyLengths' lengths are {describe(lengths)}; they must be one length >= 0 for "
                "each batch: count the keys of each batch"
            )
        self._set(lengths=lengths)
        self._set_primitive(
            depends_on_query=False,
            data=(lengths,),
            digests=(digest(lengths),),
            batch=int(lengths.shape[0]),
        )

    def _encode(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        return (self.opcode, slots[0])

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        b = _entry("KeyLengths' lengths", "batch", int(self.data[0].shape[0]), where.b)
        return j < int(self.data[0][b])

    def __str__(self) -> str:
        return f"KeyLengths({describe(self.data[0])})"
