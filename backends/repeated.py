"""What the GPU backends share to make the second call of a kind cheap.

A plan keeps the calls that were prepared on it (`Plan.calls`), by everything but addresses; a call
looks its own up and runs it. What a kernel's `run` returns, a `RepeatedCall`, is kept by
portattn.call under the call's metadata, so that the next such call skips all of that.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from portattn.backends.renewal import plan_again
from portattn.backends.stream_memory import (
    MAX_STREAMS,
    arrival_counters,
    current_stream,
    stream_scratch,
)
from portattn.plan import plan_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from portattn.backends.base import AttentionInputs, Config, Kernel
    from portattn.backends.cuda_launch import Launches
    from portattn.backends.renewal import Renewal
    from portattn.masks import Mask
    from portattn.plan import DevicePlan, DeviceSchedule, Plan

_VECTOR_BYTES = 16
_MAX_KEPT_SCRATCH = 1 << 20  # floats that a stream keeps

# The addresses of a call, in the order in which `RepeatedCall` hands them to its launches.
QUERY, KEY, VALUE, OUTPUT, LSE, KV_LENGTHS, SLOPES, BIAS, SINKS, SCRATCH, COUNTERS = range(11)
NUM_SOURCES = 11


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


class RepeatedCall:
    """The launches of one kind of call (`call_key`). Thread-safe.

    It holds the device's arrays of a plan and a schedule, and neither of the two, which may hold
    it in turn.

    Attributes:
        used: whether it ran since the plan cache last asked.
        is_renewable: whether `renewed` may do something.
    """

    __slots__ = (
        "__weakref__", "_device", "_guard", "_index", "_launches", "_num_counters", "_on_device",
        "_places", "_renewal", "_scratch_floats", "_scratch_kept", "is_renewable", "used",
    )  # fmt: skip

    def __init__(
        self,
        launches: Launches,
        device: torch.device,
        *,
        on_device: Sequence[DevicePlan | DeviceSchedule] = (),
        scratch_floats: int = 0,
        num_counters: int = 0,
        num_launches: int = 1,
        guard: Callable[[], bool] | None = None,
        renewal: Renewal | None = None,
    ) -> None:
        """Nothing is launched yet.

        Args:
            launches: with `NUM_SOURCES` addresses.
            device: of the tensors; tests have launches for the CPU.
            on_device: arrays that the launches read.
            scratch_floats: float32 scratch memory of a call.
            num_counters: arrival counters; see `arrival_counters`.
            num_launches: how many launches there are.
            guard: whether `again` may be used, asked each time.
            renewal: how other masks are planned for the launches; see renewal.py.
        """
        self._launches, self._device, self._on_device = launches, device, tuple(on_device)
        self._index = device.index if device.type == "cuda" else None
        self._scratch_floats, self._num_counters = scratch_floats, num_counters
        # Launches of two threads may alternate on a stream: what lies between two is each call's.
        self._scratch_kept = num_launches == 1 and scratch_floats <= _MAX_KEPT_SCRATCH
        self._guard, self._renewal, self.used = guard, renewal, True
        self.is_renewable = renewal is not None
        # Stream -> memory (held) and addresses of scratch and counters there.
        self._places: dict[int, tuple[object, int, int]] = {}

    def run(self, inputs: AttentionInputs) -> bool:
        """Launch on the inputs' device, which is the current one, and current stream.

        Returns:
            Whether a CUDA graph was being captured: then the plan must be kept.
        """
        for arrays in self._on_device:
            arrays.use()
        stream, capturing = self._stream(), self._is_capturing()
        memory, scratch, counters = self._place(stream, capturing)
        self._launches.run(
            (
                inputs.query.data_ptr(),
                inputs.key.data_ptr(),
                inputs.value.data_ptr(),
                inputs.output.data_ptr(),
                _pointer(inputs.lse),
                _pointer(inputs.kv_lengths),
                _pointer(inputs.alibi_slopes),
                _pointer(inputs.bias),
                _pointer(inputs.sinks),
                scratch,
                counters,
            ),
            stream,
        )
        # Freed here, in stream order: the caching allocator hands it only to later work.
        del memory
        return capturing

    def fits(self, inputs: AttentionInputs) -> bool:
        """Whether `run` may be used for inputs that other launches may be needed for."""
        tensors = (
            inputs.query, inputs.key, inputs.value, inputs.output, inputs.lse, inputs.kv_lengths,
            inputs.alibi_slopes, inputs.bias, inputs.sinks,
        )  # fmt: skip
        aligned = all(_pointer(tensor) % _VECTOR_BYTES == 0 for tensor in tensors)
        return aligned and (self._guard is None or self._guard())

    def again(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        terms: tuple[torch.Tensor | None, ...] | None,
    ) -> bool:
        """Launch for tensors that differ from those of an earlier `run` in their addresses only.

        Args:
            query, key, value, output, lse: as in AttentionInputs.
            terms: kv_lengths, alibi_slopes, bias and sinks; None for none of them.

        Returns:
            False, and nothing done, where only the kernel's `run` can: misaligned tensors, a
            stream or device that is new to the call, a CUDA graph's capture.
        """
        at = query.data_ptr(), key.data_ptr(), value.data_ptr(), output.data_ptr()
        lse_at = 0 if lse is None else lse.data_ptr()
        bits = at[0] | at[1] | at[2] | at[3] | lse_at
        more = _NO_TERMS
        if terms is not None:
            more = tuple([0 if term is None else term.data_ptr() for term in terms])
            bits |= more[0] | more[1] | more[2] | more[3]
        if bits % _VECTOR_BYTES:
            return False
        index, stream = self._index, 0
        if index is not None:
            if torch._C._cuda_getDevice() != index:
                return False
            stream = torch._C._cuda_getCurrentRawStream(index)
            # CUDA captures nothing on stream 0.
            if stream and torch._C._cuda_isCurrentStreamCapturing():
                return False
        place = self._places.get(stream)
        if place is None or (self._guard is not None and not self._guard()):
            return False
        if self._scratch_floats and not self._scratch_kept:
            place = self._place(stream, False)
        # The place holds its memory until here, in stream order.
        self._launches.run((*at, lse_at, *more, place[1], place[2]), stream)
        self.used = True
        return True

    def renewed(
        self, mask: Mask | None, q_offset: int, seqlen_q: int, seqlen_k: int
    ) -> RepeatedCall | None:
        """See `Repeat.renewed`; the plan of the mask, which is cached, keeps the call."""
        if self._renewal is None or self._is_capturing():
            return None
        if self._index is not None and torch._C._cuda_getDevice() != self._index:
            return None
        stream = self._stream()
        place = self._places.get(stream)
        if place is None:
            for arrays in self._on_device:
                arrays.use()
            place = self._place(stream, False)
        new = plan_again(self._renewal, mask, q_offset, seqlen_q, seqlen_k, self._device)
        if new is None:
            return None
        made = RepeatedCall(
            self._launches.renewed(new.numbers),
            self._device,
            on_device=new.on_device,
            num_counters=self._num_counters,
            guard=self._guard,
            renewal=self._renewal,
        )
        for arrays in new.on_device:
            arrays.use()
        # Of the current stream alone: others have not waited for the plan's arrays.
        made._places[stream] = place
        new.plan.keep_call(made, made)
        return made

    def _stream(self) -> int:
        return 0 if self._index is None else current_stream(self._index)

    def _is_capturing(self) -> bool:
        return self._index is not None and torch._C._cuda_isCurrentStreamCapturing()

    def _place(self, stream: int, capturing: bool) -> tuple[object, int, int]:
        """Scratch memory and counters for a call on the stream, and their addresses."""
        found = self._places.get(stream)
        if (
            found is not None
            and not capturing
            and (self._scratch_kept or not self._scratch_floats)
        ):
            return found
        device, floats, counters, scratch = self._device, self._scratch_floats, None, None
        if self._num_counters:
            counters = arrival_counters(device, self._num_counters)
        if floats:
            kept = self._scratch_kept and not capturing
            scratch = (
                stream_scratch(device, floats)
                if kept
                else torch.empty(floats, dtype=torch.float32, device=device)
            )
        made = ((scratch, counters), _pointer(scratch), _pointer(counters))
        if not capturing:
            if len(self._places) >= MAX_STREAMS:
                self._places.clear()
            held = made if self._scratch_kept else (counters, 0, made[2])
            self._places[stream] = held
        return made


_NO_TERMS: tuple[int, ...] = (0, 0, 0, 0)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
