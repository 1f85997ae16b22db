"""One attention call from tensors to the kernel: check, choose, run.

Everything that depends on metadata only (shapes, strides, dtypes, devices, options) is checked and
chosen once and then remembered, with what the kernel gave to repeat the call, which then costs a
look-up, its output's allocation and the launch. Another mask of the same program adds its plan.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

import torch

from portattn import dispatch, validation
from portattn.backends import registry
from portattn.backends.base import AttentionGradients, AttentionInputs, Kernel
from portattn.masks import Mask
from portattn.preparation import (
    NO_TERMS,
    Options,
    Prepared,
    Terms,
    fill_keyless,
    fill_keyless_gradients,
    prepare,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from portattn.backends.base import Repeat

_MAX_REMEMBERED = 4096


def _nothing() -> None:
    """A weak reference to nothing."""


@dataclasses.dataclass(slots=True)
class _Family:
    """What the metadata of calls mean that differ in the data of their masks only.

    Attributes:
        prepared: the checked call.
        kernel: what runs it; None where nothing is to be computed.
        is_output_alike: the output has the query's shape and strides.
        latest: a weak reference to what was last made to repeat one and may be made over.
    """

    prepared: Prepared
    kernel: Kernel | None
    is_output_alike: bool
    latest: Callable[[], Repeat | None] = _nothing


@dataclasses.dataclass(slots=True)
class _Remembered:
    """What a call's metadata mean.

    Attributes:
        family: with other masks of the same program.
        repeat: a weak reference to what repeats it: plans own that, and may go.
    """

    family: _Family
    repeat: Callable[[], Repeat | None] = _nothing


# Emptied when full: a program has few distinct calls, or endlessly many that do not come back
# (decoding).
_remembered: dict[tuple[Any, ...], _Remembered] = {}
_families: dict[tuple[Any, ...], _Family] = {}


def clear_cache() -> None:
    """Forget prepared calls and kernel choices, e.g. after the tuning database changed."""
    _remembered.clear()
    _families.clear()
    dispatch.clear_cache()


def run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: Terms, options: Options
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check, choose and compute, without gradients; tensors in the bhsd layout.

    Returns:
        The output, and the LSE or None.
    """
    call = _remember(query, key, value, terms, options)
    alike = call.family.is_output_alike
    output = torch.empty_like(query) if alike else empty_output(query, value)
    lse = None
    if options.return_lse:
        lse = torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)
    repeat = call.repeat()
    if repeat is None:
        repeat = _renewed(call, query, key, options)
    if repeat is None or not repeat.again(
        query, key, value, output, lse, None if terms is NO_TERMS else terms
    ):
        made = _compute(call.family, query, key, value, terms, options, output, lse)
        # What was made for misaligned tensors would serve the others too, slower.
        addresses = query.data_ptr() | key.data_ptr() | value.data_ptr() | output.data_ptr()
        if made is not None and addresses % 16 == 0:
            call.repeat = weakref.ref(made)
            if made.is_renewable:
                call.family.latest = call.repeat
    return output, lse


def _renewed(
    call: _Remembered, query: torch.Tensor, key: torch.Tensor, options: Options
) -> Repeat | None:
    """What repeats another call of the family, made over for this one's mask."""
    latest = call.family.latest()
    if latest is None or options.mask is None:
        return None
    q_offset = call.family.prepared.q_offset
    made = latest.renewed(options.mask, q_offset, query.shape[2], key.shape[2])
    if made is not None:
        call.repeat = call.family.latest = weakref.ref(made)
    return made


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
    call = _remember(query, key, value, terms, options)
    _compute(call.family, query, key, value, terms, options, output, lse)


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
    backend = dispatch.backward_backend(options.backend)
    # A config is the forward's, unless the one kernel that was named does both.
    if backend != options.backend or backend not in registry.KERNELS:
        options = options._replace(backend=backend, config=None)
    prepared = prepare(query, key, value, terms, options, needs_grad=True)
    if prepared.choice is None:
        fill_keyless_gradients(gradients, terms.sinks)
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


def _remember(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: Terms, options: Options
) -> _Remembered:
    """What the call's metadata mean; found out at the first such call."""
    try:
        metadata = (
            query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(),
            query.dtype, key.dtype, value.dtype, query.device, key.device, value.device,
            None if terms is NO_TERMS else _signature(terms), options,
        )  # fmt: skip
        found = _remembered.get(metadata)
    except (RuntimeError, TypeError):  # no strides, or a mask that is none and has no hash
        prepare(query, key, value, terms, options)
        raise
    if found is None:
        if len(_remembered) >= _MAX_REMEMBERED:
            _remembered.clear()
        family = _family(query, key, value, terms, options, metadata)
        found = _remembered[metadata] = _Remembered(family)
    return found


def _family(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Terms,
    options: Options,
    metadata: tuple[Any, ...],
) -> _Family:
    """The calls that this one's mask could be exchanged with."""
    mask, program = options.mask, None
    if isinstance(mask, Mask):  # else it is none, or `prepare` refuses it
        program = mask.program, mask.batch, mask.num_heads
        options = options._replace(mask=None)
    of_family = (*metadata[:-1], options, program)
    found = _families.get(of_family)
    if found is None:
        prepared = prepare(query, key, value, terms, options._replace(mask=mask))
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            validation.check_strides(name, tensor)
        kernel = None if prepared.choice is None else registry.kernel(prepared.choice.kernel_name)
        like, made = torch.empty_like(query), empty_output(query, value)
        is_alike = like.shape == made.shape and like.stride() == made.stride()
        if len(_families) >= _MAX_REMEMBERED:
            _families.clear()
        found = _families[of_family] = _Family(prepared, kernel, is_alike)
    return found


def _compute(
    call: _Family,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Terms,
    options: Options,
    output: torch.Tensor,
    lse: torch.Tensor | None,
) -> Repeat | None:
    """Returns what repeats the call for equal metadata, the output's strides among them."""
    choice = call.prepared.choice
    if call.kernel is None or choice is None:
        fill_keyless(output, lse, terms.sinks)
        return None
    inputs = _inputs(call.prepared, query, key, value, terms, options, output, lse)
    repeat = call.kernel.run(inputs, choice.config)
    taken = (inputs.kv_lengths, inputs.alibi_slopes, inputs.sinks)
    given = (terms.kv_lengths, terms.alibi_slopes, terms.sinks)
    was_converted = any(x is not y for x, y in zip(taken, given, strict=True))
    return None if was_converted else repeat


def _signature(terms: Terms) -> tuple[Any, ...]:
    return tuple(
        [
            None
            if term is None
            else (type(term), term.shape, term.stride(), term.dtype, term.device)
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
