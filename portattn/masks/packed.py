"""The primitive of packed documents."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

from portattn.errors import MaskError
from portattn.masks.mask import Mask
from portattn.masks.tables import describe, positions_inside
from portattn.masks.tensors import digest, freeze

if TYPE_CHECKING:
    from portattn.masks.base import Kept, Positions, Where
    from portattn.masks.tensors import TensorLike

_MAX_LENGTH = 2**31


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """i and j are in the same document: bounds[d] <= i, j < bounds[d + 1] for one d.

    Attributes:
        bounds: integers [documents + 1], rising from 0; the last is the number of positions that
            the mask covers. It must cover every position of the call, or the call raises
            MaskError.
    """

    bounds: TensorLike
    opcode = 18

    def __post_init__(self) -> None:
        bounds = freeze("Documents' bounds", self.bounds, torch.int64, (1,))
        values = bounds.numpy()
        if (
            values.size < 2
            or values[0] != 0
            or values[-1] >= _MAX_LENGTH
            or (values[1:] < values[:-1]).any()
        ):
            raise MaskError(
                f"Documents' bounds are {describe(bounds)}; they must have at least 2 values, "
                "start at 0, never fall, and stay below 2**31: pass the running sum of the "
                "documents' lengths from 0 (cu_seqlens)"
            )
        self._set(bounds=bounds)
        self._set_primitive(depends_on_query=True, data=(bounds,), digests=(digest(bounds),))

    def _encode(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        return (self.opcode, slots[0])

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        kept: Kept = self._document("queries", i) == self._document("keys", j)
        return kept

    def _document(self, side: str, positions: Positions) -> Positions:
        bounds = self.data[0].numpy()
        inside = positions_inside(f"Documents' bounds ({side})", int(bounds[-1]), positions)
        found: Positions = np.searchsorted(bounds, inside, side="right")
        return found

    def __str__(self) -> str:
        return f"Documents({describe(self.data[0])})"
