"""A CUDA launch that is laid out once and repeated with other pointers.

What a launch costs the host is mostly the conversion of its arguments. Here they lie in one block
of memory in the kernel's own layout; a call writes the few that change and asks the driver,
through ctypes (1 us), which needs neither CuPy nor Triton.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import TYPE_CHECKING, Any

from portattn.errors import PortattnError

if TYPE_CHECKING:
    from collections.abc import Sequence

# A tensor map must lie at a multiple of 64 bytes; a cache line pair keeps every argument whole.
_ALIGN = 128


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
    unsigned, address = ctypes.c_uint, ctypes.c_void_p
    library.cuLaunchKernel.argtypes = [address, *[unsigned] * 7, address, address, address]
    library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    library.cuDevicePrimaryCtxRetain.argtypes = [ctypes.POINTER(address), ctypes.c_int]
    library.cuCtxSetCurrent.argtypes = [address]
    return library


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
    library, context = driver(), ctypes.c_void_p()
    check(library.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context.value:
        device = ctypes.c_int()
        check(library.cuDeviceGet(ctypes.byref(device), device_index), "cuDeviceGet")
        check(library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "retaining")
        check(library.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    _threads.entered = True


class Arguments:
    """A kernel's arguments in one block of memory, with the driver's table of where each starts.

    Not for two threads at once: hold `lock` from the first write to the launch (the driver copies
    the arguments before it returns).

    Attributes:
        memory: all arguments, for ``struct.Struct.pack_into(memory, offset, ...)``.
        offsets: where each argument starts in `memory`, in bytes; addresses are multiples of 128.
        table: address of the table of addresses (``void** kernelParams``).
        lock: to be held while writing and launching.
    """

    __slots__ = ("_table", "lock", "memory", "offsets", "sizes", "table")

    def __init__(self, arguments: Sequence[bytes]) -> None:
        """Lay out the bytes of each kernel parameter, in order, as C lays them out."""
        self.sizes = tuple(len(argument) for argument in arguments)
        starts, total = [], 0
        for size in self.sizes:
            starts.append(total)
            total += -(-size // _ALIGN) * _ALIGN
        self.memory = ctypes.create_string_buffer(total + _ALIGN)
        skip = -ctypes.addressof(self.memory) % _ALIGN
        self.offsets = tuple(skip + start for start in starts)
        self._table = (ctypes.c_void_p * max(len(arguments), 1))()
        self.table = ctypes.addressof(self._table)
        self.lock = threading.Lock()
        for index, argument in enumerate(arguments):
            self.write(index, argument)
            self.point(index, self._address(index))

    def write(self, index: int, content: bytes) -> None:
        """Replace the bytes of argument `index`, all of them.

        Raises:
            ValueError: another number of bytes.
        """
        if len(content) != self.sizes[index]:
            raise ValueError(
                f"argument {index} has {self.sizes[index]} bytes, content has {len(content)}"
            )
        ctypes.memmove(self._address(index), content, self.sizes[index])

    def read(self, index: int) -> bytes:
        """The bytes of argument `index` in `memory`."""
        return ctypes.string_at(self._address(index), self.sizes[index])

    def _address(self, index: int) -> int:
        return ctypes.addressof(self.memory) + self.offsets[index]

    def point(self, index: int, address: int) -> None:
        """Read argument `index` from another host address, e.g. of a tensor map kept elsewhere."""
        self._table[index] = address


class CudaLaunch(Arguments):
    """One kernel with its arguments, ready to be launched again and again.

    The function's device must be the current one at every launch.

    Attributes:
        keep: what must live as long as the launch, e.g. the module.
    """

    __slots__ = ("_device_index", "_driver_launch", "_fixed", "_function", "_name", "keep")

    def __init__(
        self,
        function: int,
        arguments: Sequence[bytes],
        *,
        threads: int,
        shared_bytes: int,
        device_index: int,
        name: str,
        keep: object = None,
    ) -> None:
        """Lay out the arguments.

        Args:
            function: the driver's handle (CUfunction), loaded on the device.
            arguments: see `Arguments`.
            threads: of a block; blocks are one-dimensional.
            shared_bytes: dynamic shared memory of a block.
            device_index: CUDA device.
            name: of the kernel, for messages.
            keep: whatever must live as long as the launch.
        """
        super().__init__(arguments)
        self._function, self._driver_launch = function, driver().cuLaunchKernel
        self._fixed = (1, 1, threads, 1, 1, shared_bytes)
        self._device_index, self._name, self.keep = device_index, name, keep

    def launch(self, grid: int, stream: int) -> None:
        """Launch `grid` blocks on a stream of the device (torch's ``cuda_stream``, an integer).

        0 blocks are no launch.

        Raises:
            PortattnError: the driver refuses the launch.
        """
        if not hasattr(_threads, "entered"):
            _enter_context(self._device_index)
        if grid == 0:
            return
        status = self._driver_launch(self._function, grid, *self._fixed, stream, self.table, None)
        if status != 0:
            _, _, threads, _, _, shared = self._fixed
            check(
                status,
                f"launching {self._name} with {grid} blocks of {threads} threads and {shared} "
                "bytes of shared memory",
            )
