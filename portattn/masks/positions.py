"""Where query rows stand: the rule of ``q_offset``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portattn.errors import MaskError
from portattn.masks.tensors import check_int

if TYPE_CHECKING:
    from portattn.masks.base import MaskBase

_CHOICES = (
    '"end" (seqlen_k - seqlen_q: the queries are the newest tokens), "start" (0), or an int '
    "(the key position of query row 0)"
)


def resolve_q_offset(
    mask: MaskBase | None,
    q_offset: int | str | None,
    seqlen_q: int,
    seqlen_k: int,
    *,
    alibi: bool = False,
) -> int:
    """The key position at which query row 0 stands.

    Args:
        mask: the call's mask; None keeps everything.
        q_offset: an int, ``"end"`` (seqlen_k - seqlen_q), ``"start"`` (0), or None: 0 where the
            lengths are equal or nothing depends on a query's position.
        seqlen_q: number of query rows.
        seqlen_k: number of keys.
        alibi: whether the scores depend on positions even where the mask does not.

    Raises:
        MaskError: another value, or None where the lengths differ and positions matter.
    """
    if q_offset is None:
        matters = alibi or (mask is not None and mask.depends_on_query)
        if seqlen_q != seqlen_k and matters:
            raise MaskError(
                f"q_offset is None with seqlen_q {seqlen_q} and seqlen_k {seqlen_k}; a mask or "
                f"ALiBi that depends on the queries' positions needs it said: pass {_CHOICES}"
            )
        return 0
    if isinstance(q_offset, str):
        if q_offset == "end":
            return seqlen_k - seqlen_q
        if q_offset == "start":
            return 0
        raise MaskError(f"q_offset is {q_offset!r}; it must be {_CHOICES}")
    limit = 2**62 - 1
    return check_int("q_offset", q_offset, -limit, limit, f"Pass {_CHOICES}")
