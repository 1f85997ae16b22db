"""What takes part in a row: portattn's kernels and what one would use without them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

import portattn
from portattn.dispatch import candidates

if TYPE_CHECKING:
    from portattn.bench.data import Data
    from portattn.masks import Mask

Call: TypeAlias = Callable[[], torch.Tensor]
DENSE_SUFFIX = " without the mask"


class NotApplicableError(Exception):
    """This contender has no way to compute this row; the text says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute a row.

    Attributes:
        name: as in tables and JSON.
        is_own: portattn's.
        call: computes the row once and returns the output.
        layout: the output's: ``"bhsd"`` or ``"bshd"``.
        is_dense: computes the row's sizes without its mask, for comparison of rates.
        details: config, note and the like, for the JSON.
        fresh: for documents: given a seed, takes the boundaries drawn with it as a new batch
            would, and computes once; None where the row has none.
    """

    name: str
    is_own: bool
    call: Call
    layout: str = "bhsd"
    is_dense: bool = False
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    fresh: Callable[[int], torch.Tensor] | None = None

    def output(self) -> torch.Tensor:
        """One result as [batch, num_heads, seqlen_q, head_dim]."""
        return self.as_bhsd(self.call())

    def as_bhsd(self, result: torch.Tensor) -> torch.Tensor:
        """A result of it as [batch, num_heads, seqlen_q, head_dim]."""
        return result.transpose(1, 2) if self.layout == "bshd" else result


def forget_compiled() -> None:
    """Drop what torch.compile holds for rows that are done: guards are tried one after another."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def own_names(chosen: list[str] | None = None) -> list[str]:
    """Kernels to run, of backends or kernels named; default all but the reference.

    Raises:
        ConfigError: a name is neither a backend nor a kernel.
    """
    names = [name for one in chosen or ["auto"] for name in candidates(one)]
    return list(dict.fromkeys(names))


def own(name: str, data: Data, *, is_dense: bool = False) -> Contender:
    """A kernel through the public call, with its tuned or default config.

    Raises:
        NotApplicableError: the kernel refuses the row.
    """
    mask = None if is_dense else data.mask
    arguments: dict[str, Any] = {
        "backend": name,
        "enable_gqa": data.is_grouped,
        "kv_lengths": data.kv_lengths,
    }
    query, key, value = data.query, data.key, data.value
    found = portattn.explain(query, key, value, mask, **arguments)
    if found.kernel is None or found.config is None:
        raise NotApplicableError("refused: " + "; ".join(found.refused.get(name, ())))

    def call(other: Mask | None = mask) -> torch.Tensor:
        output: torch.Tensor = portattn.attention(query, key, value, other, **arguments)
        return output

    pattern, length = data.workload.pattern, data.workload.seqlen_k
    return Contender(
        name + (DENSE_SUFFIX if is_dense else ""),
        True,
        call,
        is_dense=is_dense,
        details={"config": found.config.to_dict(), "config_from": found.rung},
        fresh=(lambda seed: call(pattern.mask(length, seed))) if pattern.is_documents else None,
    )
