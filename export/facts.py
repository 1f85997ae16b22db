"""What constant mask data tells at export: how few blocks, or how near keys, it keeps."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from portattn.export.expression import Expression, Opcode

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt


@dataclasses.dataclass(frozen=True, slots=True)
class DataFacts:
    """About the mask's data tensors.

    Attributes:
        set_sizes: length of each tensor's last axis; None where it is dynamic.
        table_degrees: for each tensor that is a constant block table, the most key blocks that a
            row of it keeps for any head or batch; None for others.
        segment_bands: (slots of the primitive, low, high): low <= key - query <= high wherever
            two constant ids are equal, or positions are in the same constant document.
    """

    set_sizes: tuple[int | None, ...] = ()
    table_degrees: tuple[int | None, ...] = ()
    segment_bands: tuple[tuple[int, ...], ...] = ()


def data_facts(
    expression: Expression,
    shapes: Sequence[tuple[int | None, ...]],
    constants: Sequence[npt.NDArray[np.generic] | None],
) -> DataFacts:
    """The facts of a mask whose data has these shapes and, where they are known, these values."""
    degrees: list[int | None] = [None] * len(shapes)
    bands: list[tuple[int, ...]] = []
    for node in expression.walk():
        if node.opcode is Opcode.BLOCK_TABLE:
            table = constants[node.operands[0]]
            if table is not None and table.size:
                rows = table.reshape(-1, *table.shape[-2:]).any(0)
                degrees[node.operands[0]] = max(1, int(rows.sum(-1).max()))
        if node.opcode is Opcode.SEGMENTS:
            query_ids, key_ids = (constants[slot] for slot in node.operands)
            if query_ids is not None and key_ids is not None:
                slot_q, slot_k = node.operands
                bands.append((slot_q, slot_k, *_band(query_ids, key_ids)))
        if node.opcode is Opcode.DOCUMENTS:
            bounds = constants[node.operands[0]]
            if bounds is not None:
                reach = int(np.diff(bounds).max()) - 1
                bands.append((*node.operands, -reach, reach))
    sizes = tuple(shape[-1] if shape else None for shape in shapes)
    return DataFacts(sizes, tuple(degrees), tuple(bands))


def _band(query_ids: npt.NDArray[np.generic], key_ids: npt.NDArray[np.generic]) -> tuple[int, int]:
    """Bounds of key - query over the pairs with equal ids; 1, 0 if there are none."""
    low, high = 1, 0
    for ids in np.unique(query_ids):
        queries = np.flatnonzero((np.atleast_2d(query_ids) == ids).any(0))
        keys = np.flatnonzero((np.atleast_2d(key_ids) == ids).any(0))
        if keys.size:
            first, last = int(keys[0] - queries[-1]), int(keys[-1] - queries[0])
            low, high = (first, last) if low > high else (min(low, first), max(high, last))
    return low, high
