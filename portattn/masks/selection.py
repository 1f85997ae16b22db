"""One mask for each query head, or for each batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portattn.errors import MaskError
from portattn.masks.mask import Composite, Mask, check_count

if TYPE_CHECKING:
    from collections.abc import Iterable

    from portattn.masks.base import Kept, Positions, Where


class PerHead(Composite):
    """Query head h uses operand h; made by `per_head`."""

    opcode = 16

    def __post_init__(self) -> None:
        _check_list("per_head", self.operands, "num_heads")
        super().__post_init__()
        self._set(num_heads=len(self.operands))

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        return _nth("per_head", self.operands, "head", where.h)._keeps(i, j, where)

    def __str__(self) -> str:
        return f"per_head([{', '.join(str(mask) for mask in self.operands)}])"


class PerBatch(Composite):
    """Batch b uses operand b; made by `per_batch`."""

    opcode = 17

    def __post_init__(self) -> None:
        _check_list("per_batch", self.operands, "batch")
        super().__post_init__()
        self._set(batch=len(self.operands))

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        return _nth("per_batch", self.operands, "batch", where.b)._keeps(i, j, where)

    def __str__(self) -> str:
        return f"per_batch([{', '.join(str(mask) for mask in self.operands)}])"


def _check_list(name: str, operands: tuple[Mask, ...], attribute: str) -> None:
    check_count(len(operands))
    if not operands:
        raise MaskError(
            f"{name} got an empty list; it needs one mask for each entry of {attribute}"
        )
    for n, mask in enumerate(operands):
        if not isinstance(mask, Mask):
            raise MaskError(
                f"{name}[{n}] is {type(mask).__name__}; every entry must be a mask: "
                "use masks.All() for no restriction"
            )
        if getattr(mask, attribute) is not None:
            raise MaskError(
                f"{name}[{n}] already differs by {attribute.removeprefix('num_')} "
                f"(for {getattr(mask, attribute)} of them); it must not: join the two lists, or "
                "combine with & or | outside the list"
            )


def _nth(name: str, operands: tuple[Mask, ...], what: str, index: int) -> Mask:
    if not 0 <= index < len(operands):
        raise MaskError(
            f"{what} is {index}, but the mask is {name} with {len(operands)} entries; "
            f"it must be in [0, {len(operands)}): give {name} one mask for each"
        )
    return operands[index]


def per_head(masks: Iterable[Mask]) -> Mask:
    """A mask for each query head.

    Args:
        masks: as many masks as the call has query heads. None of them may differ by head itself.

    Raises:
        MaskError: an empty list, an entry that is no mask or differs by head.
    """
    return PerHead(tuple(masks))


def per_batch(masks: Iterable[Mask]) -> Mask:
    """A mask for each batch.

    Args:
        masks: as many masks as the call has batches. None of them may differ by batch itself.

    Raises:
        MaskError: an empty list, an entry that is no mask or differs by batch.
    """
    return PerBatch(tuple(masks))
