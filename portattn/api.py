"""The public call: `attention`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch.autograd import forward_ad

from portattn import call, dispatch, validation
from portattn.errors import ConfigError
from portattn.masks import Mask, causal
from portattn.ops import call_op
from portattn.preparation import NO_TERMS, Options, Terms, describe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portattn.backends.base import Config, ConfigValue

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_CAUSAL = causal()


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask | None = None,
    *,
    is_causal: bool = False,
    q_offset: int | Literal["end", "start"] | None = None,
    kv_lengths: torch.Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    layout: Literal["bhsd", "bshd"] = "bhsd",
    return_lse: Literal[False] = False,
    backend: str = "auto",
    deterministic: bool | None = None,
    config: Config | Mapping[str, ConfigValue] | None = None,
) -> torch.Tensor: ...


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask | None = None,
    *,
    is_causal: bool = False,
    q_offset: int | Literal["end", "start"] | None = None,
    kv_lengths: torch.Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    layout: Literal["bhsd", "bshd"] = "bhsd",
    return_lse: Literal[True],
    backend: str = "auto",
    deterministic: bool | None = None,
    config: Config | Mapping[str, ConfigValue] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask | None = None,
    *,
    is_causal: bool = False,
    q_offset: int | Literal["end", "start"] | None = None,
    kv_lengths: torch.Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    layout: Literal["bhsd", "bshd"] = "bhsd",
    return_lse: bool = False,
    backend: str = "auto",
    deterministic: bool | None = None,
    config: Config | Mapping[str, ConfigValue] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention (Vaswani et al. 2017, section 3.2.1) with any mask.

    Query row r stands at position i = q_offset + r, key j at position j. For the keys that the
    mask keeps::

        score = softcap(scale * q . k) - alibi_slope * |i - j| + bias
        softcap(x) = c * tanh(x / c)
        output = softmax(score) . value

    A row that keeps nothing gives output 0 and LSE -inf (or the sink). A NaN or inf at a key that
    a row may attend to reaches that row. Inputs are never changed; kernels run on torch's current
    stream.

    Args:
        query: [batch, num_heads, seqlen_q, head_dim]; float32, float16 or bfloat16; head_dim <=
            256; any strides with a contiguous last dimension. Under autocast the tensors are cast
            as in SDPA.
        key: [batch, num_kv_heads, seqlen_k, head_dim], the query's dtype and device.
        value: [batch, num_kv_heads, seqlen_k, head_dim_v]; head_dim_v <= 256, need not equal
            head_dim.
        mask: which keys a query may attend to, from `portattn.masks`; None keeps all. A bool
            tensor is wrapped as ``masks.dense(tensor)``. Make masks outside what torch.compile
            traces; it compiles again for another expression, not for other lengths or data.
        is_causal: keep only j <= i, in addition to the mask.
        q_offset: key position of query row 0: an int, ``"end"`` (seqlen_k - seqlen_q: the queries
            are the newest tokens) or ``"start"`` (0). Needed where the lengths differ and
            positions matter.
        kv_lengths: int32 or int64 [batch], on the query's device and never read by the host: keys
            >= kv_lengths[b] do not exist, and query r of batch b stands at kv_lengths[b] -
            seqlen_q + r.
        scale: multiplies q . k; default head_dim ** -0.5. May be 0 or negative.
        enable_gqa: allow num_heads to be a multiple of num_kv_heads; KV head h // (num_heads /
            num_kv_heads) serves query head h.
        softcap: c above; None or 0 for none (Gemma 2, arXiv:2408.00118, section 2).
        alibi_slopes: floating [num_heads] or [batch, num_heads] (Press et al. 2021,
            arXiv:2108.12409).
        bias: the query's dtype, broadcastable to [batch, num_heads, seqlen_q, seqlen_k]; may hold
            -inf.
        sinks: floating [num_heads]: one more logit per head that has no value, neither scaled nor
            capped (gpt-oss).
        layout: ``"bhsd"`` as above, or ``"bshd"``: query, key, value and output are [batch,
            seqlen, heads, dim], without a copy.
        return_lse: also return the natural log of each row's softmax denominator.
        backend: ``"auto"``: the fastest kernel known for this problem on this device, never the
            reference; or one of ``"reference"``, ``"cpu"``, ``"triton"``, ``"cupy"``, or one
            kernel's name. A named backend never falls back to another.
        deterministic: only kernels whose result never depends on timing; None follows
            `torch.use_deterministic_algorithms`.
        config: fields of the kernel's config, or a config object; None takes a tuned or default
            one.

    Returns:
        The output, in the query's dtype and layout: [batch, num_heads, seqlen_q, head_dim_v].
        With return_lse also the LSE, float32 [batch, num_heads, seqlen_q] in either layout.

    Raises:
        ShapeError: a tensor has a wrong rank, size, dtype, stride or device.
        MaskError: the mask is none, does not fit, or q_offset is needed.
        ConfigError: another argument has a value that is not allowed, or the kernel cannot run
            the config.
        UnsupportedError: no kernel can run the call; with every reason of every kernel.
    """
    if layout != "bhsd":
        query, key, value = to_bhsd(query, key, value, layout)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if kv_lengths is None and alibi_slopes is None and bias is None and sinks is None:
        terms = NO_TERMS
    else:
        terms = Terms(kv_lengths, alibi_slopes, bias, sinks)
    is_compiling = torch.compiler.is_compiling()
    if is_causal and not is_compiling:
        mask = and_causal(mask)
    options = Options(
        mask, q_offset, scale, softcap, enable_gqa, return_lse, deterministic, backend,
        config if config is None else dispatch.freeze_config(config),
    )  # fmt: skip
    if is_compiling:
        output, lse = _call_traced(query, key, value, terms, options, is_causal)
    else:
        output, lse = _call_eager(query, key, value, terms, options)
    if layout != "bhsd":
        output = output.transpose(1, 2)
    return output if lse is None else (output, lse)


def to_bhsd(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of bshd tensors in bhsd order; other ranks are left for the check of ranks.

    Raises:
        ConfigError: another layout.
    """
    if layout not in ("bhsd", "bshd"):
        raise ConfigError(
            f'layout is {layout!r}; it must be "bhsd" or "bshd": transpose the tensors to one '
            "of them"
        )
    if not all(
        isinstance(tensor, torch.Tensor) and tensor.ndim == 4 for tensor in (query, key, value)
    ):
        return query, key, value
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _call_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Terms,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Straight to the kernel, or through the op where torch's dispatcher has a say."""
    is_plain = (
        type(query) in _PLAIN_TYPES
        and type(key) in _PLAIN_TYPES
        and type(value) in _PLAIN_TYPES
        and torch._C._functorch.peek_interpreter_stack() is None
    )
    if not is_plain:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            validation.check_type(name, tensor)
    query, key, value, terms = autocast(query, key, value, terms)
    needs_dispatcher = (
        not is_plain
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or is_negated(query, key, value, terms)
        or (torch.is_grad_enabled() and requires_grad(query, key, value, terms))
    )
    if not needs_dispatcher:
        return call.run(query, key, value, terms, options)
    describe(query, key, value, terms, options)
    return call_op(query, key, value, terms, options, is_causal=False)


def is_negated(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: Terms) -> bool:
    """Whether a sign is yet to be applied (``x.conj().imag``), which the dispatcher does."""
    return (
        query.is_neg()
        or key.is_neg()
        or value.is_neg()
        or (
            terms is not NO_TERMS
            and any(isinstance(term, torch.Tensor) and term.is_neg() for term in terms)
        )
    )


def _call_traced(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Terms,
    options: Options,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Through the op, whose fake formula checks all but what it is not told."""
    query, key, value, terms = autocast(query, key, value, terms)
    if query.ndim == key.ndim == 4:
        validation.check_heads(query.shape[1], key.shape[1], enable_gqa=options.enable_gqa)
        validation.check_mask(options.mask, query.shape[0], query.shape[1])
    return call_op(query, key, value, terms, options, is_causal=is_causal)


def and_causal(mask: Mask | None) -> Mask:
    """The mask of a call with ``is_causal=True``."""
    if isinstance(mask, Mask):
        return _and_causal(mask)
    return _CAUSAL if mask is None else mask  # anything else is for the check of the mask


@functools.lru_cache(maxsize=256)
def _and_causal(mask: Mask) -> Mask:
    return mask & _CAUSAL


def autocast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: Terms
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Terms]:
    """Cast query, key, value and bias as SDPA does under autocast; float64 stays."""
    device_type = query.device.type
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return query, key, value, terms
    dtype = torch.get_autocast_dtype(device_type)
    if terms.bias is not None:
        terms = terms._replace(bias=_cast(terms.bias, dtype))
    return _cast(query, dtype), _cast(key, dtype), _cast(value, dtype), terms


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    is_eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if is_eligible else tensor


def requires_grad(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: Terms
) -> bool:
    """Whether an input of the call needs a gradient."""
    if query.requires_grad or key.requires_grad or value.requires_grad:
        return True
    return terms is not NO_TERMS and any(
        isinstance(term, torch.Tensor) and term.requires_grad for term in terms
    )
