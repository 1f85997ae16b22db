"""A CUDA driver that launches nothing and reads every parameter as the real one would."""

import ctypes
import threading

from portattn.backends import cuda_launch


class FakeDriver:
    """Stands in for libcuda.

    Attributes:
        sizes: bytes of each kernel parameter.
        status: what launches return.
        launches: (arguments of cuLaunchKernel before the table, bytes of each parameter).
    """

    def __init__(self, sizes, status=0):
        self.sizes, self.status, self.launches = sizes, status, []

    def cuLaunchKernel(self, *arguments):  # noqa: N802
        """Record the launch."""
        table = (ctypes.c_void_p * len(self.sizes)).from_address(arguments[9])
        read = [ctypes.string_at(table[i], size) for i, size in enumerate(self.sizes)]
        self.launches.append((arguments[:9], read))
        return self.status

    def cuGetErrorString(self, status, text):  # noqa: N802
        """One text for all errors."""
        text._obj.value = b"no such kernel"


def install(monkeypatch, sizes, status=0):
    """A fake driver for what is launched while the monkeypatch holds."""
    made = FakeDriver(sizes, status)
    monkeypatch.setattr(cuda_launch, "driver", lambda: made)
    monkeypatch.setattr(cuda_launch, "_threads", threading.local())
    monkeypatch.setattr(cuda_launch, "_enter_context", lambda index: None)
    return made
