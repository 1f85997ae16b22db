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

import dataclasses
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from triton import knobs

from portattn.backends.cuda_launch import Field, Launch, Launches, Patch
from portattn.backends.renewal import PARAMETERS
from portattn.backends.repeated import NUM_SOURCES, SCRATCH, RepeatedCall
from portattn.backends.stream_memory import current_stream
from portattn.backends.triton.compiled import address, aligned, is_simple, map_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.backends.base import AttentionInputs
    from portattn.backends.renewal import Renewal
    from portattn.plan import DevicePlan, DeviceSchedule

# A tensor -> the descriptor that the kernel takes for it (triton's or Gluon's TensorDescriptor).
Describe: TypeAlias = Callable[[torch.Tensor], Any]
# Where a moving tensor comes from in any call: `repeated.QUERY` or the like, and bytes behind it.
Source: TypeAlias = tuple[int, int]

_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip


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
        most_blocks: int = 0,
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
            most_blocks: see Launch.
        """
        self._most_blocks = most_blocks
        self._kernel, self._grid, self._options = kernel, grid, dict(options)
        self._arguments, self._moving = list(arguments), dict(moving)
        self._device = device
        self._first = True
        self.direct: _Direct | None = None

    def __call__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Launch on torch's current stream of the device, which must be the current one.

        Args:
            tensors: the moving ones, in the order of `moving`.
        """
        direct = self.direct
        if direct is not None and not self.is_hooked() and direct.run(tensors):
            return
        arguments = list(self._arguments)
        for (position, describe), tensor in zip(self._moving.items(), tensors, strict=True):
            arguments[position] = tensor if describe is None else describe(tensor)
        compiled = self._kernel[(self._grid,)](*arguments, **self._options)
        if self._first and self._device.type == "cuda" and torch.version.hip is None:
            grids = self._grid, self._most_blocks
            self.direct = _direct(compiled, grids, arguments, self._moving, self._device.index)
            self._first = False

    def is_hooked(self) -> bool:
        """Whether somebody wants to see launches."""
        runtime = knobs.runtime
        return bool(
            self._kernel.pre_run_hooks
            or _calls(runtime.launch_enter_hook)
            or _calls(runtime.launch_exit_hook)
        )


def _calls(hook: object) -> object:
    # A chain of hooks, one function, or None.
    return getattr(hook, "calls", hook)


class _Direct:
    """A compiled kernel with its arguments laid out.

    Attributes:
        launch: its patches' sources are indices of the moving tensors.
    """

    def __init__(self, launch: Launch, aligned: Sequence[int], count: int, index: int) -> None:
        """Of `count` moving tensors; those in `aligned` must lie at multiples of 16 bytes."""
        self.launch, self._aligned, self._index = launch, tuple(aligned), index
        self._launches = Launches([launch], num_sources=count, device_index=index)

    def run(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Launch; False, and nothing done, if the tensors need another variant."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        if any(addresses[index] % 16 for index in self._aligned):
            return False
        self._launches.run(addresses, current_stream(self._index))
        return True


class KeptCall:
    """Base of what is kept of a call: its launches go through Triton first.

    Attributes:
        repeated: what repeats the call; None before its first launch, and where only Triton can.
    """

    repeated: RepeatedCall | None = None

    @property
    def used(self) -> bool:
        """See plan.cache.KeptCall."""
        return self.repeated is not None and self.repeated.used

    @used.setter
    def used(self, used: bool) -> None:
        if self.repeated is not None:
            self.repeated.used = used

    def repeat(self, inputs: AttentionInputs) -> bool | None:
        """Run without Triton, as `RepeatedCall.run`; None, and nothing done, if it must see it."""
        repeated = self.repeated
        return repeated.run(inputs) if repeated is not None and repeated.fits(inputs) else None


def scratch_sources(sizes: Sequence[int]) -> list[Source]:
    """Where the parts of the scratch memory lie that have a size, in floats."""
    starts = [4 * sum(sizes[:index]) for index in range(len(sizes))]
    return [(SCRATCH, start) for start, size in zip(starts, sizes, strict=True) if size]


def repeated_call(
    launches: Sequence[tuple[RepeatedLaunch, Sequence[Source]]],
    device: torch.device,
    *,
    on_device: Sequence[DevicePlan | DeviceSchedule] = (),
    scratch_floats: int = 0,
    num_counters: int = 0,
    renewal: Renewal | None = None,
) -> RepeatedCall | None:
    """What repeats launches that Triton has done; None where only Triton can.

    Args:
        launches: each with where its moving tensors come from.
        device: of the tensors.
        on_device, scratch_floats, num_counters, renewal: see RepeatedCall.
    """
    made = []
    for launch, sources in launches:
        if launch.direct is None:
            return None
        found = launch.direct.launch
        patches = [
            patch._replace(source=sources[patch.source][0], offset=sources[patch.source][1])
            for patch in found.patches
        ]
        made.append(dataclasses.replace(found, patches=patches))
    first = launches[0][0]
    return RepeatedCall(
        Launches(made, num_sources=NUM_SOURCES, device_index=device.index),
        device,
        on_device=on_device,
        scratch_floats=scratch_floats,
        num_counters=num_counters,
        num_launches=len(made),
        guard=lambda: not first.is_hooked(),
        renewal=renewal,
    )


def _direct(
    compiled: Any,  # noqa: ANN401  # triton.compiler.CompiledKernel
    grids: tuple[int, int],
    arguments: Sequence[Any],
    moving: Mapping[int, Describe | None],
    device_index: int,
) -> _Direct | None:
    """What launches a compiled kernel directly; None where only Triton can."""
    if not is_simple(compiled):
        return None
    order = {position: index for index, position in enumerate(moving)}
    parameters: list[bytes] = []
    patches, fields = [], []
    metadata = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    for position, (name, kind) in enumerate(compiled.src.signature.items()):
        argument = arguments[position]
        if kind == "constexpr":
            continue
        if name in PARAMETERS:
            fields.append(Field(len(parameters), 0, PARAMETERS[name], kind.startswith("*")))
        if kind.startswith("tensordesc"):
            form = next(metadata, None)
            made = None if form is None or position not in order else map_bytes(argument, form)
            if made is None:
                return None
            patches.append(Patch(len(parameters), 0, order[position], is_map=True))
            parameters.append(made)
            parameters += [struct.pack("=i", size) for size in argument.shape]
            parameters += [struct.pack("=q", stride) for stride in argument.strides]
        elif kind.startswith("*"):
            if position in order:
                patches.append(Patch(len(parameters), 0, order[position]))
            parameters.append(struct.pack("=Q", address(argument)))
        elif kind in _FORMATS:
            parameters.append(struct.pack(f"={_FORMATS[kind]}", argument))
        else:
            return None
    parameters += [bytes(8)] * 2  # no scratch buffers
    num_warps, _, shared_bytes = compiled.packed_metadata
    launch = Launch(
        compiled.function,
        parameters,
        grids[0],
        32 * num_warps,
        shared_bytes,
        compiled.name,
        patches,
        compiled,
        fields=fields,
        most_blocks=grids[1],
    )
    multiples = [order[position] for position in aligned(compiled) if position in order]
    return _Direct(launch, multiples, len(moving), device_index)
