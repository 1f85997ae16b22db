"""Launches of a Triton or Gluon kernel without Triton's launcher, after the first.

Triton binds every argument anew at each launch, which takes longer than the kernels of short
calls. The first launch of a `RepeatedLaunch` goes through Triton, which compiles and returns the
compiled kernel; later ones write the new addresses beside the other arguments and go straight to
the driver. Kernel parameters are laid out as Triton 3.6 and 3.9 do it (backends/nvidia/driver.py):
every parameter that is not a constant, in order, a tensor descriptor being its tensor map, shape
(int32) and strides (int64); then the addresses of two scratch buffers, null where none is needed.

Everything else goes through Triton every time: other devices, the interpreter, clusters, scratch
buffers, and all launches while hooks are set (profilers use them).
"""

from __future__ import annotations

import ctypes
import inspect
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from triton import knobs

from portattn.backends.cuda_launch import CudaLaunch
from portattn.backends.repeated import current_stream

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# A tensor -> the descriptor that the kernel takes for it (triton's or Gluon's TensorDescriptor).
Describe: TypeAlias = Callable[[torch.Tensor], Any]

_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip
_MAP_BYTES = 128  # sizeof(CUtensorMap)
_MAX_MAPS = 64  # tensor maps that one parameter keeps: one per address


class RepeatedLaunch:
    """One launch, repeated with other tensors. Thread-safe.

    All arguments but the moving tensors must be what they were, and so must dtype, shape and
    strides of those: the caller keeps one of these for each combination.
    """

    def __init__(
        self,
        kernel: Any,  # noqa: ANN401  # a triton.jit or gluon.jit function, or the interpreter's
        grid: int,
        arguments: Sequence[object],
        moving: Mapping[int, Describe | None],
        options: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        """Nothing is launched yet.

        Args:
            kernel: the kernel.
            grid: programs.
            arguments: of every parameter, constants too, in order. Tensors among them that do not
                move must stay alive with the launch; None at the moving ones.
            moving: positions of the tensors that change; with a function, the kernel takes a
                descriptor of the tensor instead.
            options: num_warps and the like.
            device: of the tensors.
        """
        self._kernel, self._grid, self._options = kernel, grid, dict(options)
        self._arguments, self._moving = list(arguments), dict(moving)
        self._device = device
        self._first = True
        self._direct: _Direct | None = None

    def __call__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Launch on torch's current stream of the device, which must be the current one.

        Args:
            tensors: the moving ones, in the order of `moving`.
        """
        direct = self._direct
        if direct is not None and not _hooked(self._kernel) and direct.launch(tensors):
            return
        arguments = list(self._arguments)
        for (position, describe), tensor in zip(self._moving.items(), tensors, strict=True):
            arguments[position] = tensor if describe is None else describe(tensor)
        compiled = self._kernel[(self._grid,)](*arguments, **self._options)
        if self._first and self._device.type == "cuda" and torch.version.hip is None:
            self._direct = _direct(
                compiled, self._grid, arguments, self._moving, self._device.index
            )
            self._first = False


def _hooked(kernel: Any) -> bool:  # noqa: ANN401
    """Whether somebody wants to see launches."""
    runtime = knobs.runtime
    return bool(
        kernel.pre_run_hooks
        or _calls(runtime.launch_enter_hook)
        or _calls(runtime.launch_exit_hook)
    )


def _calls(hook: object) -> object:
    # A chain of hooks, one function, or None.
    return getattr(hook, "calls", hook)


class _Direct:
    """A compiled kernel with its arguments laid out."""

    def __init__(
        self,
        launch: CudaLaunch,
        grid: int,
        addresses: Any,  # noqa: ANN401  # a ctypes array
        aligned: Sequence[int],
        maps: Sequence[tuple[int, int, Callable[[torch.Tensor], object]]],
        device_index: int,
    ) -> None:
        """See `_direct`.

        Args:
            launch: its pointer parameters read from `addresses`.
            grid: programs.
            addresses: uint64 [moving tensors].
            aligned: moving tensors that the kernel was compiled for as multiples of 16 bytes.
            maps: (moving tensor, kernel parameter, what makes its tensor map).
            device_index: CUDA device.
        """
        self._launch, self._grid, self._addresses = launch, grid, addresses
        self._aligned, self._maps, self._device_index = tuple(aligned), tuple(maps), device_index
        self._packing = struct.Struct(f"={len(addresses)}Q")
        self._kept: dict[tuple[int, int], object] = {}

    def launch(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Launch; False, and nothing done, if the tensors need another variant."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        for index in self._aligned:
            if addresses[index] % 16:
                return False
        stream = current_stream(self._device_index)
        maps = [
            (parameter, self._map(index, addresses[index], tensors[index], make))
            for index, parameter, make in self._maps
        ]
        launch = self._launch
        with launch.lock:
            self._packing.pack_into(self._addresses, 0, *addresses)
            for parameter, made in maps:
                launch.point(parameter, id(made) + _MAP_BYTES)
            launch.launch(self._grid, stream)
        return True

    def _map(
        self,
        index: int,
        address: int,
        tensor: torch.Tensor,
        make: Callable[[torch.Tensor], object],
    ) -> object:
        found = self._kept.get((index, address))
        if found is None:
            found = make(tensor)
            if len(self._kept) >= _MAX_MAPS * len(self._maps):
                self._kept.clear()
            self._kept[index, address] = found
        return found


def _direct(
    compiled: Any,  # noqa: ANN401  # triton.compiler.CompiledKernel
    grid: int,
    arguments: Sequence[Any],
    moving: Mapping[int, Describe | None],
    device_index: int,
) -> _Direct | None:
    """What launches a compiled kernel directly; None where only Triton can."""
    if not _is_simple(compiled):
        return None
    order = {position: index for index, position in enumerate(moving)}
    addresses = (ctypes.c_uint64 * max(len(moving), 1))()
    parameters: list[bytes] = []
    moved, maps = [], []
    metadata = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    for position, kind in enumerate(compiled.src.signature.values()):
        argument = arguments[position]
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            form = next(metadata, None)
            describe = moving.get(position)
            made = None if form is None or describe is None else _tensor_map(argument, form)
            if made is None or form is None or describe is None:
                return None
            maps.append((order[position], len(parameters), _map_maker(describe, form)))
            parameters.append(bytes(_MAP_BYTES))
            parameters += [struct.pack("=i", size) for size in argument.shape]
            parameters += [struct.pack("=q", stride) for stride in argument.strides]
        elif kind.startswith("*"):
            if position in order:
                moved.append((len(parameters), order[position]))
            parameters.append(struct.pack("=Q", _address(argument)))
        elif kind in _FORMATS:
            parameters.append(struct.pack(f"={_FORMATS[kind]}", argument))
        else:
            return None
    parameters += [bytes(8)] * 2  # no scratch buffers
    num_warps, _, shared_bytes = compiled.packed_metadata
    launch = CudaLaunch(
        compiled.function,
        parameters,
        threads=32 * num_warps,
        shared_bytes=shared_bytes,
        device_index=device_index,
        name=compiled.name,
        keep=(compiled, addresses),
    )
    for parameter, index in moved:
        launch.point(parameter, ctypes.addressof(addresses) + 8 * index)
    aligned = [order[position] for position in _aligned(compiled) if position in order]
    return _Direct(launch, grid, addresses, aligned, maps, device_index)


def _is_simple(compiled: Any) -> bool:  # noqa: ANN401
    """Whether the kernel takes its arguments and nothing else, in one plain launch."""
    meta = getattr(compiled, "metadata", None)
    if meta is None:
        return False
    special = (
        "launch_pdl",
        "launch_cooperative_grid",
        "global_scratch_size",
        "profile_scratch_size",
        "instrumentation_mode",
    )
    return (
        compiled.packed_metadata[1] == 1
        and not any(getattr(meta, name, None) for name in special)
        and all(isinstance(kind, str) for kind in compiled.src.signature.values())
    )


def _address(argument: Any) -> int:  # noqa: ANN401  # a tensor, an address or None
    if argument is None:
        return 0
    return int(argument) if isinstance(argument, int) else int(argument.data_ptr())


def _aligned(compiled: Any) -> set[int]:  # noqa: ANN401
    """Positions of the parameters that the kernel was specialised for as multiples of 16."""
    return {
        path[0]
        for path, attributes in (compiled.src.attrs or {}).items()
        if any(name == "tt.divisibility" for name, _ in attributes)
    }


def _map_maker(describe: Describe, form: Mapping[str, Any]) -> Callable[[torch.Tensor], object]:
    return lambda tensor: _tensor_map(describe(tensor), form)


def _tensor_map(descriptor: Any, form: Mapping[str, Any]) -> object | None:  # noqa: ANN401
    """Triton's object around the tensor map of a descriptor; None if it is not as known.

    Its map lies behind the object's header, aligned to 128 bytes (backends/nvidia/driver.c).
    """
    from triton.backends.nvidia import driver

    more = (None,) * (len(inspect.signature(driver.make_tensordesc_arg).parameters) - 2)
    made: object = driver.make_tensordesc_arg(descriptor, form, *more)[0]
    known = type(made).__basicsize__ == 2 * _MAP_BYTES and id(made) % _MAP_BYTES == 0
    return made if known else None
