"""From validated inputs to one native call.

The filled argument struct is cached by everything but pointers.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from typing import TYPE_CHECKING, TypeAlias

import torch

from portattn import native
from portattn.backends.cpu import abi
from portattn.errors import ConfigError
from portattn.plan import plan_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from portattn.backends.base import AttentionInputs, Config
    from portattn.plan import Plan, Schedule

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MAX_CACHED = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What a kernel decides for a call.

    Attributes:
        kernel: `abi.KERNEL_MAIN` or `abi.KERNEL_DECODE`.
        block_q, block_k: tile rows and keys of the plan.
        min_piece: tiles below which a row is not cut.
        head_group: heads whose items are ordered together.
        pack: how keys and values are copied first, a key of `abi.PACK`.
        group_heads: let one task do all query heads of a KV head, where the mask allows.
    """

    kernel: int
    block_q: int
    block_k: int
    min_piece: int
    head_group: int
    pack: str
    group_heads: bool


SettingsOf: TypeAlias = "Callable[[Config], Settings]"


@dataclasses.dataclass(frozen=True, slots=True)
class _Prepared:
    """A filled struct without pointers to tensors, and what must stay alive with it."""

    args: abi.CpuArgs
    plan: Plan
    schedule: Schedule


_cache: dict[Hashable, _Prepared] = {}
_lock = threading.Lock()


def run(inputs: AttentionInputs, config: Config, settings_of: SettingsOf) -> None:
    """Compute one call; see `Kernel.run`."""
    if inputs.output.numel() == 0:
        return
    if inputs.kv_lengths is None:
        _run_one(
            inputs,
            config,
            settings_of,
            seqlen_k=inputs.key.shape[2],
            q_offset=inputs.q_offset,
            b=None,
        )
        return
    seqlen_q = inputs.query.shape[2]
    for b, length in enumerate(inputs.kv_lengths.tolist()):
        seqlen_k = min(max(length, 0), inputs.key.shape[2])
        _run_one(inputs, config, settings_of, seqlen_k=seqlen_k, q_offset=length - seqlen_q, b=b)


def _run_one(
    inputs: AttentionInputs,
    config: Config,
    settings_of: SettingsOf,
    *,
    seqlen_k: int,
    q_offset: int,
    b: int | None,
) -> None:
    """All batches (b None), or batch b alone with its own lengths."""
    query, key, value, output = inputs.query, inputs.key, inputs.value, inputs.output
    lse, bias, slopes, sinks = inputs.lse, inputs.bias, inputs.alibi_slopes, inputs.sinks
    threads = torch.get_num_threads()
    cache_key = (
        query.shape,
        key.shape,
        value.shape,
        query.stride(),
        key.stride(),
        value.stride(),
        output.stride(),
        query.dtype,
        None if lse is None else lse.stride(),
        None if bias is None else (bias.stride(), bias.dtype),
        None if slopes is None else slopes.stride(),
        inputs.mask,
        inputs.scale,
        inputs.softcap,
        config,
        threads,
        seqlen_k,
        q_offset,
        b,
    )
    prepared = _cache.get(cache_key)
    if prepared is None:
        prepared = _prepare(inputs, settings_of(config), threads, seqlen_k, q_offset, b)
        with _lock:
            if len(_cache) >= _MAX_CACHED:
                _cache.clear()
            _cache[cache_key] = prepared
    # A copy: another thread may be filling in its own pointers.
    args = abi.CpuArgs.from_buffer_copy(prepared.args)
    args.query, args.key = query.data_ptr(), key.data_ptr()
    args.value, args.output = value.data_ptr(), output.data_ptr()
    if lse is not None:
        args.lse = lse.data_ptr()
    if bias is not None:
        args.bias = bias.data_ptr()
    if slopes is not None:
        args.alibi_slopes = slopes.data_ptr()
    if sinks is not None:
        sinks = sinks.contiguous()
        args.sinks = sinks.data_ptr()
    if b is not None:
        _move_to_batch(args, inputs, b)
    _call(args)


_error = threading.local()


def _call(args: abi.CpuArgs) -> None:
    buffer = getattr(_error, "buffer", None)
    if buffer is None:
        buffer = _error.buffer = native.error_buffer()
    if abi.functions().portattn_cpu_forward(ctypes.byref(args), buffer, len(buffer)) != 0:
        raise ConfigError(buffer.value.decode(errors="replace"))


def _move_to_batch(args: abi.CpuArgs, inputs: AttentionInputs, b: int) -> None:
    """Point every tensor at batch b."""
    size = inputs.query.element_size()
    args.query += b * args.query_strides[0] * size
    args.key += b * args.key_strides[0] * size
    args.value += b * args.value_strides[0] * size
    args.output += b * args.output_strides[0] * size
    if inputs.lse is not None:
        args.lse += b * args.lse_strides[0] * 4
    if inputs.alibi_slopes is not None:
        args.alibi_slopes += b * args.alibi_strides[0] * 4
    if inputs.bias is not None:
        args.bias += b * args.bias_strides[0] * inputs.bias.element_size()


def _prepare(
    inputs: AttentionInputs,
    settings: Settings,
    threads: int,
    seqlen_k: int,
    q_offset: int,
    b: int | None,
) -> _Prepared:
    batch, num_heads, seqlen_q, head_dim = inputs.query.shape
    num_kv_heads, head_dim_v = inputs.key.shape[1], inputs.value.shape[3]
    plan = plan_mask(
        inputs.mask,
        batch=batch,
        num_heads=num_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        q_offset=q_offset,
        block_q=settings.block_q,
        block_k=settings.block_k,
    )
    grouped = settings.group_heads and plan.layout_heads == 1
    schedule = plan.schedule(
        batch=batch,
        num_heads=num_kv_heads if grouped else num_heads,
        workers=threads,
        head_dim_v=head_dim_v,
        min_piece=settings.min_piece,
    )
    args = abi.CpuArgs()
    args.struct_size, args.abi_version = ctypes.sizeof(abi.CpuArgs), native.ABI_VERSION
    _set_strides(args, inputs)
    args.batch = batch if b is None else 1
    args.num_heads, args.num_kv_heads = num_heads, num_kv_heads
    args.seqlen_q, args.seqlen_k = seqlen_q, seqlen_k
    args.head_dim, args.head_dim_v = head_dim, head_dim_v
    args.plan, args.schedule = plan.handle, schedule.handle
    args.dtype = _DTYPES[inputs.query.dtype]
    args.bias_dtype = 0 if inputs.bias is None else _DTYPES[inputs.bias.dtype]
    args.scale, args.softcap = inputs.scale, inputs.softcap
    args.kernel, args.threads = settings.kernel, threads
    args.head_group, args.pack = settings.head_group, abi.PACK[settings.pack]
    args.group_heads, args.plan_batch = int(grouped), b or 0
    return _Prepared(args, plan, schedule)


def _set_strides(args: abi.CpuArgs, inputs: AttentionInputs) -> None:
    args.query_strides[:] = inputs.query.stride()[:3]
    args.key_strides[:] = inputs.key.stride()[:3]
    args.value_strides[:] = inputs.value.stride()[:3]
    args.output_strides[:] = inputs.output.stride()[:3]
    if inputs.lse is not None:
        args.lse_strides[:] = inputs.lse.stride()
    if inputs.bias is not None:
        args.bias_strides[:] = inputs.bias.stride()
    if inputs.alibi_slopes is not None:
        strides = inputs.alibi_slopes.stride()
        args.alibi_strides[:] = (0, *strides) if len(strides) == 1 else strides
