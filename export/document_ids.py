"""Which document each position is in, from the documents' boundaries, in standard ONNX ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portattn.export.emitter import Emitter, Value


def document_ids(emitter: Emitter, bounds: Value) -> Value:
    """int64 [positions]: how many documents begin at or before each.

    Args:
        emitter: receives the nodes.
        bounds: int64 [documents + 1], rising from 0; the last is the number of positions.
    """
    size = bounds.slice(bounds.dim(0) - 1, bounds.dim(0), axis=0)
    # Empty documents at the end begin where no position is.
    starts = emitter.op("Compress", bounds, bounds < size, axis=0)
    empty = emitter.op("Expand", emitter.constant([0]), size)
    ones = emitter.op("Expand", emitter.constant([1]), starts.dim(0))
    counts = emitter.op("ScatterElements", empty, starts, ones, axis=0, reduction="add")
    return emitter.op("CumSum", counts, emitter.constant(0))
