"""A CUDA driver that launches nothing and reads every parameter as the real one would."""

import ctypes
import threading
from ctypes import POINTER, c_int, c_uint, c_void_p

from portattn.backends import cuda_launch

_LAUNCH = ctypes.CFUNCTYPE(c_int, c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p)
_REPLACE = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p)


class FakeDriver:
    """Stands in for libcuda.

    Attributes:
        sizes: bytes of each kernel parameter.
        status: what launches return.
        launches: (arguments of cuLaunchKernel before the table, bytes of each parameter).
    """

    def __init__(self, sizes, status=0):
        self.sizes, self.status, self.launches = sizes, status, []
        self._pointers = _LAUNCH(self._launch_kernel), _REPLACE(self._replace_address)
        self.functions = tuple(ctypes.cast(one, c_void_p).value for one in self._pointers)

    def _launch_kernel(self, *arguments):
        """Record the launch."""
        read = [ctypes.string_at(arguments[9][i], size) for i, size in enumerate(self.sizes)]
        self.launches.append((arguments[:9], read))
        return self.status

    def _replace_address(self, tensor_map, address):
        """The map's third word."""
        assert tensor_map % 64 == 0
        ctypes.c_uint64.from_address(tensor_map + 16).value = address
        return 0

    def cuGetErrorString(self, status, text):  # noqa: N802
        """One text for all errors."""
        text._obj.value = b"no such kernel"


def install(monkeypatch, sizes, status=0):
    """A fake driver for what is launched while the monkeypatch holds."""
    made = FakeDriver(sizes, status)
    monkeypatch.setattr(cuda_launch, "driver", lambda: made)
    monkeypatch.setattr(cuda_launch, "driver_functions", lambda: made.functions)
    monkeypatch.setattr(cuda_launch, "_threads", threading.local())
    monkeypatch.setattr(cuda_launch, "_enter_context", lambda index: None)
    return made
