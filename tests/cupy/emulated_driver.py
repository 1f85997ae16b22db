"""cuLaunchKernel and cuTensorMapReplaceAddress of an emulator, as libportattn calls them."""

import ctypes
import itertools
import threading
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_int, c_uint, c_void_p

from portattn.backends.cuda_launch import Launch
from portattn.errors import PortattnError

# (grid, the bytes of each parameter) -> what went wrong, or None.
Emulate = Callable[[int, list[bytes]], bytes | None]

_kernels: dict[int, tuple[Emulate, tuple[int, ...]]] = {}
_handles = itertools.count(1)
_errors: list[BaseException] = []
_stream = threading.Lock()  # launches on a stream run one after the other


@ctypes.CFUNCTYPE(c_int, c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p)
def _launch_kernel(function, grid, *more):
    """As the driver's, at once."""
    emulate, sizes = _kernels[function]
    parameters = more[-2]
    read = [ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes)]
    try:
        with _stream:
            error = emulate(grid, read)
        assert error is None, error.decode()
    except BaseException as raised:  # ctypes would swallow it
        _errors.append(raised)
        return 1
    return 0


@ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p)
def _replace_address(tensor_map, address):
    """As the driver's, for the maps of emulated_maps.py."""
    ctypes.c_uint64.from_address(tensor_map).value = address or 0
    return 0


_FUNCTIONS = tuple(
    ctypes.cast(function, c_void_p).value for function in (_launch_kernel, _replace_address)
)


def emulated_launch(emulate: Emulate, arguments: Sequence[bytes], threads: int) -> Launch:
    """A launch that calls `emulate`."""
    handle = next(_handles)
    _kernels[handle] = (emulate, tuple(len(argument) for argument in arguments))
    return Launch(handle, arguments, 0, threads, 0, "emulated", functions=_FUNCTIONS)


def run_emulated(run: Callable[..., object], *arguments: object) -> object:
    """Call a kernel's `run`; what went wrong in the emulator is raised as it was."""
    _errors.clear()
    try:
        return run(*arguments)
    except PortattnError:
        if _errors:
            raise _errors[0] from None
        raise
