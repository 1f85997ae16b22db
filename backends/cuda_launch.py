"""CUDA launches that are laid out once and repeated with other addresses.

What a launch costs the host is mostly the conversion of its arguments. Here they lie in one block
of memory in the kernel's own layout; csrc/launch.cpp copies it, writes the addresses that change,
also into tensor maps, and asks the driver, which needs neither CuPy nor Triton.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from ctypes import POINTER, c_void_p
from typing import TYPE_CHECKING, Any

from portattn.backends.launch_layout import (
    Field,
    Launch,
    NativeLaunch,
    Patch,
    lay_out,
    native_launch,
)
from portattn.errors import PortattnError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Field", "Launch", "Launches", "Patch", "check", "driver", "driver_functions"]


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
        self._device_index, self._call = device_index, native_launch()
        self._native = (NativeLaunch * len(self._launches))()
        self._keep = [
            lay_out(launch, made)
            for launch, made in zip(self._launches, self._native, strict=True)
        ]
        self._functions = functions
        self._fixed = (ctypes.addressof(self._native), len(self._launches), *functions)

    def renewed(self, numbers: Mapping[str, int]) -> Launches:
        """The same launches for another plan; its numbers by the names of the fields."""
        made = object.__new__(Launches)
        made.__dict__.update(self.__dict__)
        made._native = type(self._native).from_buffer_copy(self._native)
        made._keep = []
        for launch, native, memory in zip(self._launches, made._native, self._keep, strict=True):
            arguments = type(memory.arguments).from_buffer_copy(memory.arguments)
            for name, at, pack in memory.fields:
                pack(arguments, at, numbers[name])
            native.arguments = ctypes.addressof(arguments)
            native.grid = min(numbers["num_work"], launch.most_blocks)
            made._keep.append(memory._replace(arguments=arguments))
        made._fixed = (ctypes.addressof(made._native), len(self._launches), *self._functions)
        return made

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
        launch, blocks = self._launches[status >> 32], self._native[status >> 32].grid
        check(
            status & 0xFFFFFFFF,
            f"launching {launch.name} with {blocks} blocks of {launch.threads} threads and "
            f"{launch.shared_bytes} bytes of shared memory",
        )
