"""Configs that won on other problems: they are tried early."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from portattn.tuning_db import lookup

if TYPE_CHECKING:
    from portattn.tuning_db.key import ProblemKey
    from portattn.tuning_db.records import Params

MOST = 6
# In doublings of a length: what a kernel is compiled for weighs most, then the mask's kind.
_OTHER_WIDTH, _OTHER_MASK, _OTHER_EDGE = 100.0, 8.0, 1.0


class Portfolio:
    """Winners by kernel: those of the database and seeds, and those found in this run.

    Args:
        family: of the device; other families' configs are not worth trying first.
    """

    def __init__(self, family: str) -> None:
        self._family = family
        self._found: dict[str, list[tuple[ProblemKey, Params]]] = {}

    def add(self, kernel_name: str, key: ProblemKey, params: Params) -> None:
        """Note the winner of a problem."""
        self._found.setdefault(kernel_name, []).insert(0, (key, params))

    def near(self, kernel_name: str, key: ProblemKey) -> list[Params]:
        """Winners of the kernel, those of the most similar problems first, each once."""
        rows = lookup.known(kernel_name, self._family)
        stored = [(row.key, row.params) for row in rows if row.params]
        everything = [*self._found.get(kernel_name, ()), *stored]
        everything.sort(key=lambda entry: _apart(entry[0], key))
        distinct: list[Params] = []
        for _, params in everything:
            if params not in distinct:
                distinct.append(params)
        return distinct[:MOST]


def _apart(a: ProblemKey, b: ProblemKey) -> float:
    """How different two problems are to a kernel's compiler and to its schedule."""
    widths = (a.head_dim, a.head_dim_v, a.dtype, a.varlen) != (
        b.head_dim,
        b.head_dim_v,
        b.dtype,
        b.varlen,
    )
    sizes = ((a.sq_bucket, b.sq_bucket), (a.sk_bucket, b.sk_bucket))
    return (
        _OTHER_WIDTH * widths
        + _OTHER_MASK * (a.mask_kind != b.mask_kind)
        + _OTHER_EDGE * (a.causal != b.causal)
        + sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in sizes)
    )
