"""One attention call from tensors to the kernel: check, choose, run.

Everything that depends on metadata only (shapes, dtypes, devices, options) is checked and chosen
once and then remembered: a call costs one dictionary look-up and its output's allocation.
"""

from __future__ import annotations

from typing import Any

import torch

from portattn import dispatch, validation
from portattn.backends import registry
from portattn.backends.base import AttentionGradients, AttentionInputs, Kernel
from portattn.preparation import NO_TERMS, Options, Prepared, Terms, prepare

_MAX_PREPARED = 4096


# Metadata -> (what it means, the kernel). Emptied when full: a program has few distinct calls, or
# endlessly many that do not come back (decoding).
_prepared: dict[tuple[Any, ...], tuple[Prepared, Kernel | None]] = {}


def clear_cache() -> None:
    """Forget prepared calls and kernel choices, e.g. after the tuning database changed."""
    _prepared.clear()
    dispatch.clear_cache()


def run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: Terms, options: Options
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check, choose and compute, without gradients; tensors in the bhsd layout.

    Returns:
        The output, and the LSE or None.
    """
    found = _remembered(query, key, value, terms, options)
    output = empty_output(query, value)
    lse = (
        torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)
        if options.return_lse
        else None
    )
    _compute(*found, query, key, value, terms, options, output, lse)
    return output, lse


def run_into(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Terms,
    options: Options,
    output: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """`run` into the caller's tensors, for tests and tuning; lse as options ask for it."""
    found = _remembered(query, key, value, terms, options)
    _compute(*found, query, key, value, terms, options, output, lse)


def run_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Terms,
    options: Options,
    output: torch.Tensor,
    lse: torch.Tensor,
    gradients: AttentionGradients,
) -> None:
    """Write the gradients that are asked for."""
    prepared = prepare(query, key, value, terms, options, needs_grad=True)
    if prepared.choice is None:
        _fill_keyless_gradients(gradients, terms.sinks)
        return
    kernel = registry.kernel(prepared.choice.kernel_name)
    inputs = _inputs(prepared, query, key, value, terms, options, output, lse)
    kernel.backward(inputs, gradients, prepared.choice.config)


def empty_output(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """An output tensor in bhsd order whose memory is laid out as the query's: bhsd or bshd."""
    batch, num_heads, seqlen_q, _ = query.shape
    if query.stride(1) < query.stride(2):
        shape = (batch, seqlen_q, num_heads, value.shape[3])
        return torch.empty(shape, dtype=query.dtype, device=query.device).transpose(1, 2)
    shape = (batch, num_heads, seqlen_q, value.shape[3])
    return torch.empty(shape, dtype=query.dtype, device=query.device)


def lse_dtype(query: torch.Tensor) -> torch.dtype:
    """float32; float64 for a float64 query (reference only)."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _remembered(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: Terms, options: Options
) -> tuple[Prepared, Kernel | None]:
    """What the call's metadata means; made at the first such call."""
    metadata = (
        query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype, query.device,
        key.device, value.device,
        query.layout, key.layout, value.layout, options,
        None if terms is NO_TERMS else _signature(terms),
    )  # fmt: skip
    found = _prepared.get(metadata)
    if found is None:
        found = _prepare_and_remember(metadata, query, key, value, terms, options)
    # Strides are no part of the metadata: any will do, but for the last dimension.
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            validation.check_strides(name, tensor)
    return found


def _compute(
    prepared: Prepared,
    kernel: Kernel | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Terms,
    options: Options,
    output: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    if kernel is None or prepared.choice is None:
        _fill_keyless(output, lse, terms.sinks)
        return
    inputs = _inputs(prepared, query, key, value, terms, options, output, lse)
    kernel.run(inputs, prepared.choice.config)


def _prepare_and_remember(
    metadata: tuple[Any, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Terms,
    options: Options,
) -> tuple[Prepared, Kernel | None]:
    prepared = prepare(query, key, value, terms, options)
    kernel = None if prepared.choice is None else registry.kernel(prepared.choice.kernel_name)
    if len(_prepared) >= _MAX_PREPARED:
        _prepared.clear()
    _prepared[metadata] = (prepared, kernel)
    return prepared, kernel


def _signature(terms: Terms) -> tuple[Any, ...]:
    return tuple(
        [
            (type(term), term.shape, term.dtype, term.device)
            if isinstance(term, torch.Tensor)
            else type(term)
            for term in terms
        ]
    )


def _inputs(
    prepared: Prepared,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Terms,
    options: Options,
    output: torch.Tensor,
    lse: torch.Tensor | None,
) -> AttentionInputs:
    kv_lengths, slopes, bias, sinks = terms
    if terms is not NO_TERMS:
        wide = lse_dtype(query)
        kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
        slopes = None if slopes is None else slopes.to(wide).contiguous()
        bias = None if bias is None else bias.expand(*query.shape[:3], key.shape[2])
        sinks = None if sinks is None else sinks.to(wide).contiguous()
    return AttentionInputs(
        query=query,
        key=key,
        value=value,
        output=output,
        lse=lse,
        mask=options.mask,
        q_offset=prepared.q_offset,
        kv_lengths=kv_lengths,
        scale=prepared.scale,
        softcap=prepared.softcap,
        alibi_slopes=slopes,
        bias=bias,
        sinks=sinks,
        deterministic=options.deterministic,
    )


def _fill_keyless(
    output: torch.Tensor, lse: torch.Tensor | None, sinks: torch.Tensor | None
) -> None:
    """The result where there are no keys: 0, and an LSE of -inf or the sink."""
    output.zero_()
    if lse is not None:
        lse.copy_(torch.full_like(lse, -torch.inf) if sinks is None else sinks[:, None])


def _fill_keyless_gradients(gradients: AttentionGradients, sinks: torch.Tensor | None) -> None:
    """Without keys only the LSE depends on an input: on the sink, one to one."""
    for name in ("query", "key", "value", "alibi_slopes", "bias", "sinks"):
        target = getattr(gradients, name)
        if target is not None:
            target.zero_()
    if gradients.sinks is not None and gradients.lse is not None:
        gradients.sinks.copy_(gradients.lse.sum((0, 2)))
