"""What a call means without its data: options checked, lengths resolved, kernel chosen."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch

from portattn import dispatch, validation
from portattn.errors import ConfigError
from portattn.masks import resolve_q_offset
from portattn.problem import AttentionProblem

if TYPE_CHECKING:
    from portattn.backends.base import AttentionGradients, Config
    from portattn.masks import Mask


# Named tuples: made at every call, they cost a quarter of a frozen dataclass, and hash as tuples.
class Terms(NamedTuple):
    """The optional tensors of a call, as given.

    Attributes:
        kv_lengths: integer [batch].
        alibi_slopes: floating [num_heads] or [batch, num_heads].
        bias: the query's dtype, broadcastable to [batch, num_heads, seqlen_q, seqlen_k].
        sinks: floating [num_heads].
    """

    kv_lengths: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


class Options(NamedTuple):
    """What a call says beside its tensors.

    Attributes:
        mask: ``is_causal`` folded in; None keeps everything.
        q_offset: int, ``"end"``, ``"start"`` or None, unresolved.
        scale: None for head_dim ** -0.5.
        softcap: 0 or None for none.
        enable_gqa, return_lse, deterministic, backend: as in `portattn.attention`.
        config: as `portattn.dispatch.freeze_config` gives it.
    """

    mask: Mask | None = None
    q_offset: int | str | None = None
    scale: float | None = None
    softcap: float | None = None
    enable_gqa: bool = False
    return_lse: bool = False
    deterministic: bool = False
    backend: str = "auto"
    config: Config | dispatch.ConfigItems | None = None


NO_TERMS = Terms()


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """A checked call without its data.

    Attributes:
        problem: what is to be computed.
        q_offset: resolved.
        scale, softcap: resolved.
        choice: what runs it; None where nothing is to be computed (an empty output, or no keys).
    """

    problem: AttentionProblem
    q_offset: int
    scale: float
    softcap: float
    choice: dispatch.Choice | None


def prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Terms,
    options: Options,
    *,
    needs_grad: bool = False,
) -> Prepared:
    """Check everything and choose what runs.

    Raises:
        ShapeError, MaskError, ConfigError, UnsupportedError: the call cannot be.
    """
    described = describe(query, key, value, terms, options, needs_grad=needs_grad)
    problem = described.problem
    if 0 in (problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_k):
        dispatch.candidates(options.backend)
        return described
    choice = dispatch.choose(problem, options.backend, options.config)
    return dataclasses.replace(described, choice=choice)


def describe(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Terms,
    options: Options,
    *,
    needs_grad: bool = False,
) -> Prepared:
    """Check everything, without a choice."""
    check_scalars(options.scale, options.softcap)
    validation.check_tensors(
        query, key, value, enable_gqa=options.enable_gqa, backend=options.backend
    )
    validation.check_terms(query, key, **terms._asdict())
    batch, num_heads, seqlen_q, head_dim = query.shape
    seqlen_k = key.shape[2]
    validation.check_mask(options.mask, batch, num_heads)
    q_offset = _resolve_q_offset(terms, options, seqlen_q, seqlen_k)
    problem = AttentionProblem(
        device_type=query.device.type,
        dtype=str(query.dtype).removeprefix("torch."),
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=key.shape[1],
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=value.shape[3],
        program=() if options.mask is None else options.mask.program,
        q_offset=q_offset,
        features=_features(terms, options, needs_grad),
        device=str(query.device),
    )
    scale = head_dim**-0.5 if options.scale is None else float(options.scale)
    return Prepared(problem, q_offset, scale, float(options.softcap or 0.0), None)


def _resolve_q_offset(terms: Terms, options: Options, seqlen_q: int, seqlen_k: int) -> int:
    if terms.kv_lengths is not None:
        if options.q_offset not in (None, "end"):
            raise ConfigError(
                f"q_offset is {options.q_offset!r} beside kv_lengths, which places query r of "
                "batch b at "
                'kv_lengths[b] - seqlen_q + r; it must be None or "end": drop one of the two'
            )
        return seqlen_k - seqlen_q
    has_alibi = terms.alibi_slopes is not None
    return resolve_q_offset(options.mask, options.q_offset, seqlen_q, seqlen_k, alibi=has_alibi)


def _features(terms: Terms, options: Options, needs_grad: bool) -> frozenset[str]:
    present = {
        "softcap": bool(options.softcap),
        "alibi": terms.alibi_slopes is not None,
        "bias": terms.bias is not None,
        "sinks": terms.sinks is not None,
        "kv_lengths": terms.kv_lengths is not None,
        "lse": options.return_lse,
        "deterministic": options.deterministic,
        "grad": needs_grad,
    }
    return frozenset(name for name, is_present in present.items() if is_present)


def check_scalars(scale: object, softcap: object) -> None:
    """``scale`` and ``softcap``.

    Raises:
        ConfigError: see the message.
    """
    if scale is not None and not _is_finite(scale):
        raise ConfigError(
            f"scale is {scale!r}; it must be a finite number, or None for head_dim ** -0.5"
        )
    if softcap is not None and not (_is_finite(softcap) and softcap >= 0):
        raise ConfigError(f"softcap is {softcap!r}; it must be a number above 0, or None for none")


def _is_finite(number: object) -> TypeGuard[float]:
    # A traced scale is symbolic: its value is not known, so it is not asked for.
    if isinstance(number, (torch.SymFloat, torch.SymInt)):
        return True
    return isinstance(number, (int, float)) and math.isfinite(number)


def fill_keyless(
    output: torch.Tensor, lse: torch.Tensor | None, sinks: torch.Tensor | None
) -> None:
    """Write the result where there are no keys: 0, and an LSE of -inf or the sink."""
    output.zero_()
    if lse is not None:
        lse.copy_(torch.full_like(lse, -torch.inf) if sinks is None else sinks[:, None])


def fill_keyless_gradients(gradients: AttentionGradients, sinks: torch.Tensor | None) -> None:
    """Write the gradients: without keys only the LSE depends on an input, on the sink."""
    for name in ("query", "key", "value", "alibi_slopes", "bias", "sinks"):
        target = getattr(gradients, name)
        if target is not None:
            target.zero_()
    if gradients.sinks is not None and gradients.lse is not None:
        gradients.sinks.copy_(gradients.lse.sum((0, 2)))
