"""CUDA launches that are laid out once and repeated with other addresses.

What a launch costs the host is mostly the conversion of its arguments. Here they lie in one block
of memory in the kernel's own layout; csrc/launch.cpp copies it, writes the addresses that change,
also into tensor maps, and asks the driver, which needs neither CuPy nor Triton.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct
import threading
from ctypes import POINTER, c_int32, c_int64, c_uint8, c_uint32, c_void_p
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from portattn import native
from portattn.errors import PortattnError

if TYPE_CHECKING:
    from collections.abc import Sequence

# A tensor map must lie at a multiple of 64 bytes; structs that hold some are as large.
_ALIGN, _MAP_ALIGN = 16, 128
_MAX_BYTES, _MAX_ARGUMENTS = 8192, 256  # PA_LAUNCH_MAX_... in launch.h


@functools.cache
def driver() -> Any:  # noqa: ANN401  # ctypes finds the functions by name
    """The CUDA driver library, by ctypes.

    Raises:
        PortattnError: it is not installed.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise PortattnError(
            f"the CUDA driver library cannot be loaded ({error}); install NVIDIA's driver, or "
            'move the tensors to the CPU or name backend="cpu"'
        ) from error
    library.cuGetErrorString.argtypes = [ctypes.c_int, POINTER(ctypes.c_char_p)]
    library.cuDevicePrimaryCtxRetain.argtypes = [POINTER(c_void_p), ctypes.c_int]
    library.cuCtxSetCurrent.argtypes = [c_void_p]
    return library


@functools.cache
def driver_functions() -> tuple[int, int]:
    """Addresses of cuLaunchKernel and of cuTensorMapReplaceAddress (0 before CUDA 12)."""
    library = driver()
    replace = getattr(library, "cuTensorMapReplaceAddress", None)
    launch = ctypes.cast(library.cuLaunchKernel, c_void_p).value or 0
    return launch, 0 if replace is None else ctypes.cast(replace, c_void_p).value or 0


def check(status: int, what: str) -> None:
    """Raise what the driver returned.

    Raises:
        PortattnError: status is not 0; the message has the driver's own text.
    """
    if status != 0:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode(errors="replace")
        raise PortattnError(f"{what} failed: CUDA error {status}, {reason}")


_threads = threading.local()


def _enter_context(device_index: int) -> None:
    """Give this thread the device's primary context if it has none: the driver wants one."""
    library, context = driver(), c_void_p()
    check(library.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context.value:
        device = ctypes.c_int()
        check(library.cuDeviceGet(ctypes.byref(device), device_index), "cuDeviceGet")
        check(library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "retaining")
        check(library.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    _threads.entered = True


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


class _NativePatch(ctypes.Structure):
    """pa_patch."""

    _fields_: ClassVar = [
        ("at", c_int32),
        ("source", c_int32),
        ("offset", c_int64),
        ("is_map", c_int32),
        ("reserved", c_int32),
    ]


class _NativeLaunch(ctypes.Structure):
    """pa_launch."""

    _fields_: ClassVar = [
        ("struct_size", c_uint32),
        ("abi_version", c_uint32),
        ("function", c_void_p),
        ("arguments", POINTER(c_uint8)),
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
def _native_launch() -> Any:  # noqa: ANN401  # a ctypes function
    function = native.library().portattn_launch
    function.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, ctypes.c_char_p, c_void_p]
    function.restype = c_int64
    return function


class Launches:
    """Launches of one call, ready to be repeated one after the other. Thread-safe."""

    def __init__(
        self,
        launches: Sequence[Launch],
        *,
        num_sources: int,
        device_index: int,
    ) -> None:
        """Lay out the arguments.

        Args:
            launches: in order; the device must be the current one whenever they run.
            num_sources: addresses of a call.
            device_index: CUDA device.
        """
        self._launches = tuple(launches)
        own = self._launches[0].functions
        self._on_driver, functions = own is None, own or driver_functions()
        if not functions[1] and any(patch.is_map for one in launches for patch in one.patches):
            raise PortattnError(
                f"{self._launches[0].name} takes tensor maps, and the CUDA driver has no "
                "cuTensorMapReplaceAddress: install a driver of CUDA 12 or later"
            )
        self._pack = struct.Struct(f"={num_sources}Q").pack
        self._device_index, self._call = device_index, _native_launch()
        self._native = (_NativeLaunch * len(self._launches))()
        self._keep = [
            _lay_out(launch, made)
            for launch, made in zip(self._launches, self._native, strict=True)
        ]
        self._fixed = (ctypes.addressof(self._native), len(self._launches), *functions)

    def run(self, addresses: Sequence[int], stream: int) -> None:
        """Launch on a stream of the device (torch's ``cuda_stream``, an integer).

        Args:
            addresses: of the call, in the order of the patches' sources.
            stream: see above.

        Raises:
            PortattnError: the driver refuses a launch.
        """
        if self._on_driver and not hasattr(_threads, "entered"):
            _enter_context(self._device_index)
        status = self._call(*self._fixed, self._pack(*addresses), stream)
        if status != 0:
            self._fail(status)

    def _fail(self, status: int) -> None:
        if status < 0:
            raise PortattnError("libportattn has another pa_launch; reinstall portattn")
        launch = self._launches[status >> 32]
        check(
            status & 0xFFFFFFFF,
            f"launching {launch.name} with {launch.grid} blocks of {launch.threads} threads and "
            f"{launch.shared_bytes} bytes of shared memory",
        )


def _lay_out(launch: Launch, made: _NativeLaunch) -> tuple[object, ...]:
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
    made.struct_size, made.abi_version = ctypes.sizeof(_NativeLaunch), native.ABI_VERSION
    made.function, made.grid, made.threads = launch.function, launch.grid, launch.threads
    made.shared_bytes, made.num_bytes = launch.shared_bytes, len(content)
    made.num_arguments, made.num_patches = len(starts), len(launch.patches)
    made.arguments = ctypes.cast(memory, POINTER(c_uint8))
    made.starts = ctypes.cast(firsts, POINTER(c_int32))
    made.patches = ctypes.cast(patches, POINTER(_NativePatch))
    return memory, firsts, patches
