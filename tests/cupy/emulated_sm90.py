"""The sm_90a kernel on a CPU: forward_sm90.cu with emulator_sm90.hpp, launched by its Python."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from portattn.backends.cuda_launch import Launch
from portattn.backends.cupy.config_sm90 import Variant
from portattn.backends.cupy.forward_sm90 import CupyForwardSm90
from portattn.backends.cupy.loader import SOURCE_DIR
from tests.cupy.emulated import compile_library
from tests.cupy.emulated_driver import emulated_launch, run_emulated
from tests.cupy.emulated_maps import encode

# Orders of emulator_core.hpp: copies at once and products late; blocks and threads reversed,
# copies late and products at once. What is read or overwritten too early shows in one of the two.
FORWARD, REVERSED = 8, 7
SEED = 16


@functools.cache
def library(variant: Variant, sources: Path = SOURCE_DIR) -> ctypes.CDLL:
    """The variant as a shared library, compiled once per process."""
    path = compile_library("emulate_forward_sm90.cpp", dict(variant.defines()), sources)
    loaded = ctypes.CDLL(str(path))
    loaded.emulate.restype = ctypes.c_char_p
    loaded.emulate.argtypes = [ctypes.c_char_p, ctypes.c_int64] * 2 + [ctypes.c_int] * 4
    return loaded


class EmulatedForwardSm90(CupyForwardSm90):
    """Launches in the emulator instead of on a device; everything else is the kernel's own."""

    name = "sm90_emulated"
    order = FORWARD
    workers = 3
    sources = SOURCE_DIR

    def __init__(self) -> None:
        super().__init__()
        self.variants: list[Variant] = []  # of each launch

    def next_order(self) -> int:
        """The order of the next launch."""
        return self.order

    def _device_reasons(self, problem):
        return []

    def _workers(self, inputs, config):
        return self.workers

    def _encode(self, address, shape):
        return encode(address, shape)

    def _make_launch(
        self, variant: Variant, threads: int, device: torch.device, arguments: Sequence[bytes]
    ) -> Launch:
        def emulate(grid: int, parameters: list[bytes]) -> bytes | None:
            self.variants.append(variant)
            params, hopper = parameters
            return library(variant, self.sources).emulate(
                params, len(params), hopper, len(hopper), grid, threads,
                variant.shared_bytes(), self.next_order(),
            )  # fmt: skip

        return emulated_launch(emulate, arguments, threads)

    def run(self, inputs, config):
        """In the emulator, on this thread."""
        return run_emulated(super().run, inputs, config)


class ReversedForwardSm90(EmulatedForwardSm90):
    """See `REVERSED`."""

    name = "sm90_emulated_reversed"
    order = REVERSED


class RandomForwardSm90(EmulatedForwardSm90):
    """Another random schedule each launch: warps run far ahead and fall far behind."""

    name = "sm90_emulated_random"

    def next_order(self) -> int:
        """Copies and products at once or late in turns."""
        seed = len(self.variants)
        return SEED * seed + (FORWARD, REVERSED, FORWARD, 0, 15)[seed % 5]
