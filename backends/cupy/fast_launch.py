"""A call's launches, laid out at its first time and repeated with other addresses.

For any kernel whose first parameter is the struct of params.cuh, with or without tensor maps after
it:

    call = ForwardCall(prepare(inputs, config, workers), make_launch, maps, map_bytes)
    call.run(inputs)  # now, and for every later call on the plan with an equal `call_key`

`make_launch` turns the bytes of the parameters into what launches them (`cuda_launch`); on a
device

    def make_launch(arguments):
        function = loader.load_function(program, device_index, shared_bytes)
        return device_launch(function, arguments, threads, shared_bytes, device_index, name)
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from portattn.backends.cuda_launch import CudaLaunch
from portattn.backends.cupy.params import offset_of, pointer
from portattn.backends.repeated import arrival_counters, current_stream

if TYPE_CHECKING:
    from portattn.backends.base import AttentionInputs
    from portattn.backends.cupy.launch import Launch

_MAX_MAPS = 64  # sets of tensor maps that a call keeps: one per set of addresses

# The fields that change from call to call; each group lies in one piece.
_TENSORS = ("query", "key", "value", "output", "lse", "alibi", "bias", "sinks")
_SCRATCH = ("piece_output", "piece_lse", "counters", "running_output", "running_lse")
_tensors, _scratch = struct.Struct(f"={len(_TENSORS)}Q"), struct.Struct(f"={len(_SCRATCH)}Q")


class LaunchLike(Protocol):
    """What `ForwardCall` needs of a `cuda_launch.CudaLaunch`; tests have others."""

    memory: Any
    offsets: tuple[int, ...]
    lock: Any

    def write(self, index: int, content: bytes) -> None:
        """See `cuda_launch.Arguments.write`."""

    def launch(self, grid: int, stream: int) -> None:
        """See `cuda_launch.CudaLaunch.launch`."""


MakeLaunch: TypeAlias = Callable[[Sequence[bytes]], LaunchLike]
# The parameters after the struct, which hold tensor maps: (inputs, pass index) -> one each.
Maps: TypeAlias = "Callable[[AttentionInputs, int], Sequence[bytes]]"


def device_launch(
    function: Any,  # noqa: ANN401  # CuPy has no types
    arguments: Sequence[bytes],
    threads: int,
    shared_bytes: int,
    device_index: int,
    name: str,
) -> CudaLaunch:
    """A launch of a `cupy.cuda.Function`; see `cuda_launch.CudaLaunch`."""
    return CudaLaunch(
        function.ptr,
        arguments,
        threads=threads,
        shared_bytes=shared_bytes,
        device_index=device_index,
        name=name,
        keep=function,
    )


def _group_offset(names: Sequence[str]) -> int:
    """Offset of the first field, the others being right behind it.

    Raises:
        ValueError: they are not, in params.cuh.
    """
    first = offset_of(names[0])
    for index, name in enumerate(names):
        if offset_of(name) != first + 8 * index:
            raise ValueError(f"params.cuh must have {', '.join(names)} in this order, together")
    return first


class ForwardCall:
    """One kind of call, ready to be repeated. Thread-safe.

    It holds the device's arrays of the plan and the schedule, and neither of the two, which may
    hold it in turn.
    """

    def __init__(
        self,
        prepared: Launch[Any],
        make_launch: MakeLaunch,
        maps: Maps | None = None,
        map_bytes: Sequence[int] = (),
    ) -> None:
        """Lay out every pass.

        Args:
            prepared: what `launch.prepare` made of the first call.
            make_launch: see the module.
            maps: the tensor maps, if the kernel takes any; kept by the addresses of query, key,
                value and output.
            map_bytes: sizes of the parameters that follow the struct.
        """
        self._on_device = prepared.on_device
        self._maps = maps
        self._kept_maps: dict[tuple[int, ...], list[Sequence[bytes]]] = {}
        passes = [prepared.pass_params(index) for index in range(prepared.num_passes)]
        self._grids = [grid for grid, _ in passes]
        blank = [bytes(size) for size in map_bytes]
        self._launches = [make_launch([params, *blank]) for _, params in passes]
        self._tensors_at, self._scratch_at = _group_offset(_TENSORS), _group_offset(_SCRATCH)
        self._sizes, self._num_counters = prepared.scratch_sizes, prepared.num_counters
        self._has_scratch = self._num_counters > 0 or any(self._sizes)

    def run(self, inputs: AttentionInputs) -> bool:
        """Launch every pass on the inputs' device, which is the current one, and current stream.

        Returns:
            Whether a CUDA graph was being captured: then the plan must be kept.
        """
        query, key, value, output = inputs.query, inputs.key, inputs.value, inputs.output
        device = query.device
        plan, schedule = self._on_device
        capturing = plan.use()
        schedule.use()
        addresses = (
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            output.data_ptr(),
            pointer(inputs.lse),
            pointer(inputs.alibi_slopes),
            pointer(inputs.bias),
            pointer(inputs.sinks),
        )
        stream = current_stream(device.index) if device.type == "cuda" else 0
        kept, scratch = self._allocate(device) if self._has_scratch else (None, None)
        maps = None if self._maps is None else self._maps_of(inputs, addresses[:4])
        for index, launch in enumerate(self._launches):
            start = launch.offsets[0]
            with launch.lock:
                _tensors.pack_into(launch.memory, start + self._tensors_at, *addresses)
                if scratch is not None:
                    _scratch.pack_into(launch.memory, start + self._scratch_at, *scratch)
                if maps is not None:
                    for number, content in enumerate(maps[index]):
                        launch.write(1 + number, content)
                launch.launch(self._grids[index], stream)
        # Freed here, in stream order: the caching allocator hands it only to later work.
        del kept
        return capturing

    def _allocate(self, device: torch.device) -> tuple[object, tuple[int, ...]]:
        """Scratch memory in one piece, and the address of each part; 0 for those not needed."""
        counters = arrival_counters(device, self._num_counters) if self._num_counters else None
        if not any(self._sizes):
            return counters, (0, 0, pointer(counters), 0, 0)
        memory = torch.empty(sum(self._sizes), dtype=torch.float32, device=device)
        address, starts = memory.data_ptr(), []
        for size in self._sizes:
            starts.append(address if size else 0)
            address += 4 * size
        piece_output, piece_lse, running_output, running_lse = starts
        at = (piece_output, piece_lse, pointer(counters), running_output, running_lse)
        return (memory, counters), at

    def _maps_of(
        self, inputs: AttentionInputs, addresses: tuple[int, ...]
    ) -> list[Sequence[bytes]]:
        found = self._kept_maps.get(addresses)
        if found is None:
            maps = self._maps
            found = [] if maps is None else [maps(inputs, i) for i in range(len(self._launches))]
            if len(self._kept_maps) >= _MAX_MAPS:
                self._kept_maps.clear()
            self._kept_maps[addresses] = found
        return found
