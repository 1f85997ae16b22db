"""One launch of a CUDA kernel as numbers and bytes, and in csrc/launch.h's own layout."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct
from ctypes import POINTER, c_int32, c_int64, c_uint8, c_uint32, c_void_p
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from portattn import native
from portattn.errors import PortattnError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A tensor map must lie at a multiple of 64 bytes; structs that hold some are as large.
_ALIGN, _MAP_ALIGN = 16, 128
_MAX_BYTES, _MAX_ARGUMENTS = 8192, 256  # PA_LAUNCH_MAX_... in launch.h


class Patch(NamedTuple):
    """What changes in a launch's arguments from call to call.

    Attributes:
        argument: index of the kernel's parameter.
        at: where in it, in bytes.
        source: which of the call's addresses.
        offset: bytes added to it.
        is_map: a tensor map, which gets the address; else 8 bytes, which are the address.
    """

    argument: int
    at: int
    source: int
    offset: int = 0
    is_map: bool = False


class Field(NamedTuple):
    """A number in a launch's arguments that is another one for another plan.

    Attributes:
        argument, at: as in `Patch`.
        name: which of the plan's numbers; see renewal.py.
        is_address: 8 bytes; else an int32.
    """

    argument: int
    at: int
    name: str
    is_address: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        function: the driver's handle (CUfunction), loaded on the device.
        arguments: the bytes of each kernel parameter, in order.
        grid, threads: blocks, and threads of each; both one-dimensional. 0 blocks are no launch.
        shared_bytes: dynamic shared memory of a block.
        name: of the kernel, for messages.
        patches: what each call writes into the arguments.
        keep: whatever must live as long as the launch, e.g. the module.
        functions: what launches it in place of `driver_functions`.
        fields: what another plan changes in the arguments.
        most_blocks: another plan's grid is its ``num_work``, but not more than this.
    """

    function: int
    arguments: Sequence[bytes]
    grid: int
    threads: int
    shared_bytes: int
    name: str
    patches: Sequence[Patch] = ()
    keep: object = None
    functions: tuple[int, int] | None = None
    fields: Sequence[Field] = ()
    most_blocks: int = 0


class _NativePatch(ctypes.Structure):
    """pa_patch."""

    _fields_: ClassVar = [
        ("at", c_int32),
        ("source", c_int32),
        ("offset", c_int64),
        ("is_map", c_int32),
        ("reserved", c_int32),
    ]


class NativeLaunch(ctypes.Structure):
    """pa_launch."""

    _fields_: ClassVar = [
        ("struct_size", c_uint32),
        ("abi_version", c_uint32),
        ("function", c_void_p),
        ("arguments", c_void_p),
        ("starts", POINTER(c_int32)),
        ("patches", POINTER(_NativePatch)),
        ("num_bytes", c_int32),
        ("num_arguments", c_int32),
        ("num_patches", c_int32),
        ("grid", c_uint32),
        ("threads", c_uint32),
        ("shared_bytes", c_uint32),
    ]


@functools.cache
def native_launch() -> Any:  # noqa: ANN401  # a ctypes function
    """portattn_launch of launch.h."""
    function = native.library().portattn_launch
    function.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, ctypes.c_char_p, c_void_p]
    function.restype = c_int64
    return function


class Memory(NamedTuple):
    """What a pa_launch points to, and where its fields lie in it."""

    arguments: ctypes.Array[c_uint8]
    starts: ctypes.Array[c_int32]
    patches: ctypes.Array[_NativePatch]
    fields: tuple[tuple[str, int, Callable[..., None]], ...]


_pack_address, _pack_integer = struct.Struct("=Q").pack_into, struct.Struct("=i").pack_into


def lay_out(launch: Launch, made: NativeLaunch) -> Memory:
    """Fill in a pa_launch; returns what it points to."""
    starts, content = [], bytearray()
    for argument in launch.arguments:
        align = _MAP_ALIGN if len(argument) >= _MAP_ALIGN else _ALIGN
        content += bytes(-len(content) % align)
        starts.append(len(content))
        content += argument
    if len(content) > _MAX_BYTES or len(starts) > _MAX_ARGUMENTS:
        raise PortattnError(
            f"{launch.name} has {len(starts)} arguments of {len(content)} bytes; launch.h has "
            f"room for {_MAX_ARGUMENTS} of {_MAX_BYTES}"
        )
    memory = (c_uint8 * max(len(content), 1)).from_buffer_copy(content or b"\0")
    firsts = (c_int32 * max(len(starts), 1))(*starts)
    patches = (_NativePatch * max(len(launch.patches), 1))(
        *[
            _NativePatch(
                starts[patch.argument] + patch.at, patch.source, patch.offset, patch.is_map
            )
            for patch in launch.patches
        ]
    )
    made.struct_size, made.abi_version = ctypes.sizeof(NativeLaunch), native.ABI_VERSION
    made.function, made.grid, made.threads = launch.function, launch.grid, launch.threads
    made.shared_bytes, made.num_bytes = launch.shared_bytes, len(content)
    made.num_arguments, made.num_patches = len(starts), len(launch.patches)
    made.arguments = ctypes.addressof(memory)
    made.starts = ctypes.cast(firsts, POINTER(c_int32))
    made.patches = ctypes.cast(patches, POINTER(_NativePatch))
    fields = tuple(
        (field.name, starts[field.argument] + field.at,
         _pack_address if field.is_address else _pack_integer)
        for field in launch.fields
    )  # fmt: skip
    return Memory(memory, firsts, patches, fields)
