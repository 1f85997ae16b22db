"""The algebra: ``&``, ``|``, ``~``."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from portattn.errors import MaskError
from portattn.masks.base import MAX_DEPTH, MAX_OPERANDS, VERSION, Kept, MaskBase, Positions, Where


class Mask(MaskBase):
    """Which keys a query may attend to; masks combine with ``&``, ``|`` and ``~``.

    ``&`` and ``|`` also work inside torch.compile(fullgraph=True). ``~`` does not (Dynamo traces
    no ``~`` of an object), nor does making a mask from a tensor (its values are hashed): do those
    outside.
    """

    def __and__(self, other: Mask) -> Mask:
        return all_of((self, _operand("&", other)))

    def __or__(self, other: Mask) -> Mask:
        return any_of((self, _operand("|", other)))

    def __invert__(self) -> Mask:
        return self.operand if isinstance(self, Not) else Not((self,))

    def _set_primitive(
        self,
        *,
        depends_on_query: bool,
        data: tuple[torch.Tensor, ...] = (),
        digests: tuple[str, ...] = (),
        batch: int | None = None,
        num_heads: int | None = None,
    ) -> None:
        """Set every attribute of a mask without operands."""
        self._set(data=data, digests=digests, batch=batch, num_heads=num_heads, depth=1)
        self._set(depends_on_query=depends_on_query)
        self._set(program=(VERSION, *self._encode(tuple(range(len(data))))))


def _operand(operator: str, value: object) -> Mask:
    if isinstance(value, Mask):
        return value
    way = (
        "wrap a bool tensor with masks.dense(...)"
        if isinstance(value, torch.Tensor)
        else ("build it from portattn.masks")
    )
    raise MaskError(f"a mask {operator} {type(value).__name__}: both sides must be masks; {way}")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class All(Mask):
    """Keeps everything; ``~All()`` keeps nothing."""

    opcode = 0

    def __post_init__(self) -> None:
        self._set_primitive(depends_on_query=False)

    def _encode(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        return (self.opcode,)

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        return np.ones((), np.bool_)

    def __str__(self) -> str:
        return "All()"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Composite(Mask):
    """An expression over other masks: merges their data, one slot per distinct tensor."""

    operands: tuple[Mask, ...]

    def __post_init__(self) -> None:
        data: tuple[torch.Tensor, ...] = ()
        digests: tuple[str, ...] = ()
        maps: tuple[tuple[int, ...], ...] = ()
        for mask in self.operands:
            slots: tuple[int, ...] = ()
            for tensor, digest in zip(mask.data, mask.digests, strict=True):
                if digest not in digests:
                    data, digests = (*data, tensor), (*digests, digest)
                slots = (*slots, digests.index(digest))
            maps = (*maps, slots)
        self._set(data=data, digests=digests, _maps=maps)
        self._set(
            batch=_agreed("batch", "batch size", self.operands),
            num_heads=_agreed("num_heads", "number of heads", self.operands),
            depends_on_query=any(mask.depends_on_query for mask in self.operands),
            depth=1 + max(mask.depth for mask in self.operands),
        )
        if self.depth > MAX_DEPTH:
            raise MaskError(
                f"the mask nests {self.depth} levels deep; at most {MAX_DEPTH} are allowed: "
                "combine with one operator in a row where possible, which stays flat"
            )
        self._set(program=(VERSION, *self._encode(tuple(range(len(data))))))

    def _header(self) -> tuple[int, ...]:
        return (self.opcode, len(self.operands))

    def _encode(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        maps: tuple[tuple[int, ...], ...] = self._maps  # type: ignore[attr-defined]
        body = self._header()
        for mask, local in zip(self.operands, maps, strict=True):
            body = (*body, *mask._encode(tuple(slots[slot] for slot in local)))
        return body


def _agreed(attribute: str, what: str, operands: tuple[Mask, ...]) -> int | None:
    """The value that all operands agree on, None where none has one."""
    agreed: int | None = None
    for mask in operands:
        value: int | None = getattr(mask, attribute)
        if agreed is not None and value is not None and value != agreed:
            raise MaskError(
                f"the {what} of combined masks is {agreed} in one and {value} in another; "
                "it must be the same in all: make the tables, ids or lists for one size"
            )
        agreed = value if agreed is None else agreed
    return agreed


class And(Composite):
    """Keeps what every operand keeps; made by ``&``."""

    opcode = 13

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        kept = self.operands[0]._keeps(i, j, where)
        for mask in self.operands[1:]:
            kept = kept & mask._keeps(i, j, where)
        return kept

    def __str__(self) -> str:
        return " & ".join(_grouped(mask) for mask in self.operands)


class Or(Composite):
    """Keeps what any operand keeps; made by ``|``."""

    opcode = 14

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        kept = self.operands[0]._keeps(i, j, where)
        for mask in self.operands[1:]:
            kept = kept | mask._keeps(i, j, where)
        return kept

    def __str__(self) -> str:
        return " | ".join(_grouped(mask) for mask in self.operands)


class Not(Composite):
    """Keeps what its operand does not; made by ``~``."""

    opcode = 15

    @property
    def operand(self) -> Mask:
        """What is negated."""
        return self.operands[0]

    def _header(self) -> tuple[int, ...]:
        return (self.opcode,)

    def _keeps(self, i: Positions, j: Positions, where: Where) -> Kept:
        return ~self.operand._keeps(i, j, where)

    def __str__(self) -> str:
        return f"~{_grouped(self.operand)}"


def _grouped(mask: Mask) -> str:
    return f"({mask})" if isinstance(mask, (And, Or)) else str(mask)


def check_count(count: int) -> None:
    """Refuse more operands than MAX_OPERANDS with a MaskError."""
    if count > MAX_OPERANDS:
        raise MaskError(
            f"a mask joins {count} others; at most {MAX_OPERANDS} are allowed: "
            "use KeySet, QuerySet or BlockTable for many positions"
        )


def _flat(kind: type[Composite], operands: tuple[Mask, ...]) -> tuple[Mask, ...]:
    """Operands of nested ``kind`` pulled up; of equal ones the first."""
    check_count(len(operands))
    flat: tuple[Mask, ...] = ()
    for mask in operands:
        for part in mask.operands if isinstance(mask, kind) else (mask,):
            if part not in flat:
                flat = (*flat, part)
    check_count(len(flat))
    return flat


def all_of(operands: tuple[Mask, ...]) -> Mask:
    """The masks joined by ``&``: nested ones flattened, repeated ones and All() dropped."""
    flat = _flat(And, operands)
    rest = tuple(mask for mask in flat if not isinstance(mask, All)) or flat[:1]
    return rest[0] if len(rest) == 1 else And(rest)


def any_of(operands: tuple[Mask, ...]) -> Mask:
    """The masks joined by ``|``: nested ones flattened, repeated ones dropped, All() wins."""
    flat = _flat(Or, operands)
    for mask in flat:
        if isinstance(mask, All):
            return mask
    return flat[0] if len(flat) == 1 else Or(flat)
