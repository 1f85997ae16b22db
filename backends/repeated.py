"""What the GPU backends share to make the second call of a kind cheap.

A plan keeps the calls that were prepared on it (`Plan.calls`), by everything but addresses; a call
looks its own up, writes the addresses, and launches.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import torch

from portattn.plan import plan_mask

if TYPE_CHECKING:
    from collections.abc import Hashable

    from portattn.backends.base import AttentionInputs, Config, Kernel
    from portattn.plan import Plan

_VECTOR_BYTES = 16
_MAX_COUNTER_STREAMS = 16


def plan_of(inputs: AttentionInputs, block_q: int, block_k: int) -> Plan:
    """The plan of a call in tiles of block_q rows and block_k keys; see `plan_mask`."""
    batch, num_heads, seqlen_q, _ = inputs.query.shape
    return plan_mask(
        inputs.mask,
        batch=batch,
        num_heads=num_heads,
        seqlen_q=seqlen_q,
        seqlen_k=inputs.key.shape[2],
        q_offset=inputs.q_offset,
        block_q=block_q,
        block_k=block_k,
    )


def call_key(kernel: Kernel, inputs: AttentionInputs, config: Config) -> Hashable:
    """All that a call's launches depend on beside its plan and its addresses.

    The mask, q_offset and block sizes are the plan's. Of the addresses it has whether query, key,
    value and output start at multiples of 16 bytes. Whatever a kernel's launches are made to
    depend on must be in here.
    """
    query, key, value, output = inputs.query, inputs.key, inputs.value, inputs.output
    addresses = query.data_ptr() | key.data_ptr() | value.data_ptr() | output.data_ptr()
    lse, slopes, bias, sinks = inputs.lse, inputs.alibi_slopes, inputs.bias, inputs.sinks
    if slopes is None and bias is None and sinks is None:
        terms = None
    else:
        terms = (
            None if slopes is None else slopes.stride(),
            None if bias is None else (bias.dtype, bias.stride()),
            None if sinks is None else sinks.stride(),
        )
    return (
        kernel, config, query.device, query.dtype, query.shape, key.shape, value.shape,
        query.stride(), key.stride(), value.stride(), output.stride(),
        None if lse is None else lse.stride(), terms, inputs.q_offset, inputs.scale,
        inputs.softcap, addresses % _VECTOR_BYTES == 0,
    )  # fmt: skip


_NOTHING = contextlib.nullcontext()


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which the device is CUDA's current one; it costs little where it is already."""
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        return _NOTHING
    return torch.cuda.device(device)


def current_stream(device_index: int) -> int:
    """Torch's current stream of a CUDA device as the driver's integer."""
    return int(torch._C._cuda_getCurrentRawStream(device_index))


_counters: collections.OrderedDict[tuple[torch.device, int], torch.Tensor] = (
    collections.OrderedDict()
)
_counters_lock = threading.Lock()


def arrival_counters(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros, this stream's own; a launch leaves them at zero.

    Kept for the last 16 streams. A CUDA graph gets its own: it may be replayed on any stream.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (device, stream)
    with _counters_lock:
        found = _counters.get(key)
        if found is None or found.numel() < count:
            size = 1 << (count - 1).bit_length()
            found = torch.zeros(size, dtype=torch.int32, device=device)
            _counters[key] = found
            while len(_counters) > _MAX_COUNTER_STREAMS:
                _counters.popitem(last=False)
        _counters.move_to_end(key)
        return found
