"""What every mask has: program, data, predicate, and the ways to look at it."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, ClassVar, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from portattn.errors import MaskError
from portattn.masks import json_format, picture
from portattn.masks.positions import resolve_q_offset

if TYPE_CHECKING:
    from pathlib import Path

    from portattn.masks.mask import Mask
    from portattn.plan import Plan

Positions: TypeAlias = npt.NDArray[np.int64]
Kept: TypeAlias = npt.NDArray[np.bool_]

VERSION = 1
MAX_DEPTH = 64  # of nested expressions; the planner recurses too
MAX_OPERANDS = 4096  # of one expression; finding repeated ones takes quadratic time


@dataclasses.dataclass(frozen=True, slots=True)
class Where:
    """What a predicate may depend on beside the two positions: length of the keys, batch, head."""

    seqlen_k: int
    b: int
    h: int


class MaskBase(abc.ABC):
    """A mask without its algebra (`portattn.masks.mask.Mask` adds ``&``, ``|`` and ``~``).

    Masks say which keys a query may attend to, with no lengths in them. They are immutable,
    hashable and equal by content (the same expression over the same data). Every attribute is
    plain and set at construction, so that torch.compile sees a tuple of ints and a tuple of
    tensors.

    Attributes:
        program: the expression as integers (docs/formats.md, "Program"); ``program[0]`` is the
            version.
        data: the tensors that the program's slots name; contiguous, on the CPU, never to be
            changed.
        digests: the content hash of each data tensor.
        batch: the only batch size that the mask fits, or None for any.
        num_heads: the only number of query heads that the mask fits, or None for any.
        depth: levels of the expression, 1 for a primitive.
        depends_on_query: whether a query's position matters, not only the key's.
    """

    opcode: ClassVar[int]
    program: tuple[int, ...]
    data: tuple[torch.Tensor, ...]
    digests: tuple[str, ...]
    batch: int | None
    num_heads: int | None
    depth: int
    depends_on_query: bool

    @abc.abstractmethod
    def _encode(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        """The program after its version; ``slots[n]`` is the final slot of ``self.data[n]``."""

    @abc.abstractmethod
    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        """The predicate; the result broadcasts with i and j."""

    @abc.abstractmethod
    def __str__(self) -> str:
        """The expression as one would write it."""

    def _set(self, **attributes: object) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return str(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskBase):
            return NotImplemented
        return self.program == other.program and self.digests == other.digests

    def __hash__(self) -> int:
        found: int | None = self.__dict__.get("_hash")
        if found is None:
            found = hash((self.program, self.digests))
            self._set(_hash=found)
        return found

    def __bool__(self) -> bool:
        raise MaskError(
            "a mask has no truth value; combine masks with & | ~ (not with and, or, not), "
            "and compare with `mask is None`"
        )

    def keeps(
        self, i: npt.ArrayLike, j: npt.ArrayLike, *, seqlen_k: int, b: int = 0, h: int = 0
    ) -> Kept:
        """The mask's meaning, in numpy: whether the query at position i may attend to key j.

        Args:
            i: integer query positions (``q_offset + row``); any shape.
            j: integer key positions in [0, seqlen_k), broadcastable with i.
            seqlen_k: number of keys.
            b: batch.
            h: query head.

        Returns:
            bool, of the broadcast shape of i and j.

        Raises:
            MaskError: positions that are no integers, a key outside, or data that is too small.
        """
        rows, keys = np.asarray(i), np.asarray(j)
        for name, positions in (("i", rows), ("j", keys)):
            if positions.dtype.kind not in "iu":
                raise MaskError(f"{name} has dtype {positions.dtype}; positions are integers")
        if keys.size and (keys.min() < 0 or keys.max() >= seqlen_k):
            raise MaskError(
                f"j has positions in [{keys.min()}, {keys.max()}]; they must be in [0, {seqlen_k})"
            )
        rows, keys = rows.astype(np.int64), keys.astype(np.int64)
        kept = self._keeps(rows, keys, Where(seqlen_k, b, h))
        return np.array(np.broadcast_to(kept, np.broadcast_shapes(rows.shape, keys.shape)))

    def to_dense(
        self,
        seqlen_q: int,
        seqlen_k: int,
        q_offset: int | str | None = None,
        *,
        b: int = 0,
        h: int = 0,
    ) -> torch.Tensor:
        """The mask of batch b and head h as a bool tensor [seqlen_q, seqlen_k], True where kept.

        For looking and testing: it takes seqlen_q * seqlen_k bytes. ``q_offset`` as in
        `attention`.
        """
        offset = resolve_q_offset(self, q_offset, seqlen_q, seqlen_k)
        rows = np.arange(offset, offset + seqlen_q)[:, None]
        return torch.from_numpy(
            self.keeps(rows, np.arange(seqlen_k)[None, :], seqlen_k=seqlen_k, b=b, h=h)
        )

    def plan(
        self,
        seqlen_q: int,
        seqlen_k: int,
        q_offset: int | str | None = None,
        *,
        block: tuple[int, int] = (128, 128),
        batch: int | None = None,
        num_heads: int | None = None,
    ) -> Plan:
        """The plan for these lengths: which KV tiles each query tile visits (cached).

        Args:
            seqlen_q: number of query rows.
            seqlen_k: number of keys.
            q_offset: key position of query row 0: an int, ``"end"``, ``"start"``, or None when the
                lengths are equal.
            block: (block_q, block_k), rows and keys of a tile.
            batch: batch size; None takes the mask's own, else 1.
            num_heads: number of query heads; None takes the mask's own, else 1.

        Raises:
            MaskError: the mask does not fit, or q_offset is needed.
        """
        # The planner lies above masks; this convenience is the one way back.
        from portattn.plan import plan_mask

        block_q, block_k = block
        return plan_mask(
            cast("Mask", self),
            batch=batch if batch is not None else self.batch or 1,
            num_heads=num_heads if num_heads is not None else self.num_heads or 1,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            q_offset=resolve_q_offset(self, q_offset, seqlen_q, seqlen_k),
            block_q=block_q,
            block_k=block_k,
        )

    def density(self, seqlen_q: int, seqlen_k: int, q_offset: int | str | None = None) -> float:
        """The share of (query, key) pairs that are kept, exact, over all batches and heads."""
        return float(self.plan(seqlen_q, seqlen_k, q_offset).density)

    def show(
        self,
        seqlen_q: int,
        seqlen_k: int,
        q_offset: int | str | None = None,
        *,
        width: int = 64,
        b: int = 0,
        h: int = 0,
    ) -> str:
        """The mask as text, queries downwards; see `portattn.masks.picture.show`."""
        offset = resolve_q_offset(self, q_offset, seqlen_q, seqlen_k)
        return picture.show(self, seqlen_q, seqlen_k, offset, width=width, b=b, h=h)

    def plot(
        self,
        path: str | Path,
        seqlen_q: int,
        seqlen_k: int,
        q_offset: int | str | None = None,
        *,
        pixels: int = 512,
        b: int = 0,
        h: int = 0,
    ) -> None:
        """Write a PNG of the mask; see `portattn.masks.picture.plot`. Needs matplotlib."""
        offset = resolve_q_offset(self, q_offset, seqlen_q, seqlen_k)
        picture.plot(self, path, seqlen_q, seqlen_k, offset, pixels=pixels, b=b, h=h)

    def to_json(self) -> str:
        """The mask as JSON text that `portattn.masks.from_json` reads back, equal."""
        return json_format.dump(self.program, self.data)
