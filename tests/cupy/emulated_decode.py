"""The CuPy decode kernel on a CPU: decode.cu with emulator.hpp, launched by its own Python."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from portattn.backends.cuda_launch import Arguments
from portattn.backends.cupy.config_decode import DecodeVariant
from portattn.backends.cupy.decode import CupyDecode
from portattn.backends.cupy.loader import SOURCE_DIR
from tests.cupy.emulated import EARLY, LATE, compile_library

CAPABILITY = (8, 6)


@functools.cache
def library(variant: DecodeVariant, sources: Path = SOURCE_DIR) -> ctypes.CDLL:
    """The variant as a shared library, compiled once per process."""
    loaded = ctypes.CDLL(
        str(compile_library("emulate_decode.cpp", dict(variant.defines()), sources))
    )
    loaded.emulate.restype = ctypes.c_char_p
    loaded.emulate.argtypes = [ctypes.c_char_p, ctypes.c_int64] + [ctypes.c_int] * 4
    return loaded


class EmulatedDecodeLaunch(Arguments):
    """Launches in the emulator."""

    def __init__(self, kernel, variant: DecodeVariant, arguments: Sequence[bytes]) -> None:
        super().__init__(arguments)
        self.kernel, self.variant = kernel, variant

    def launch(self, grid: int, stream: int) -> None:
        """The kernel of the variant, on this thread."""
        self.kernel.launches.append((self.variant, grid))
        params = self.read(0)
        error = library(self.variant, self.kernel.sources).emulate(
            params, len(params), grid, 32 * self.variant.config.num_warps,
            self.variant.shared_bytes(), self.kernel.order,
        )  # fmt: skip
        assert error is None, error.decode()


class EmulatedDecode(CupyDecode):
    """Launches in the emulator instead of on a device; everything else is the kernel's own."""

    name = "cupy_decode_emulated"
    order = EARLY
    num_sms = 5
    sources = SOURCE_DIR

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[DecodeVariant, int]] = []  # and their grids

    def _device_reasons(self, problem):
        return []

    def _capability(self, problem):
        return CAPABILITY

    def _num_sms(self, inputs):
        return self.num_sms

    def _make_launch(
        self, variant: DecodeVariant, device: torch.device, arguments: Sequence[bytes]
    ) -> EmulatedDecodeLaunch:
        return EmulatedDecodeLaunch(self, variant, arguments)


class ReversedDecode(EmulatedDecode):
    """Blocks and threads from last to first, copies as late as the waits allow."""

    name = "cupy_decode_emulated_reversed"
    order = LATE
