"""The CuPy decode kernel on a CPU: decode.cu with emulator.hpp, launched by its own Python."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from portattn.backends.cuda_launch import Launch
from portattn.backends.cupy.config_decode import DecodeVariant
from portattn.backends.cupy.decode import CupyDecode
from portattn.backends.cupy.loader import SOURCE_DIR
from tests.cupy.emulated import EARLY, LATE, compile_library
from tests.cupy.emulated_driver import emulated_launch, run_emulated

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
    ) -> Launch:
        threads = 32 * variant.config.num_warps

        def emulate(grid: int, parameters: list[bytes]) -> bytes | None:
            self.launches.append((variant, grid))
            (params,) = parameters
            return library(variant, self.sources).emulate(
                params, len(params), grid, threads, variant.shared_bytes(), self.order
            )

        return emulated_launch(emulate, arguments, threads)

    def run(self, inputs, config):
        """In the emulator, on this thread."""
        return run_emulated(super().run, inputs, config)


class ReversedDecode(EmulatedDecode):
    """Blocks and threads from last to first, copies as late as the waits allow."""

    name = "cupy_decode_emulated_reversed"
    order = LATE
