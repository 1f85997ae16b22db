"""The sm_90a kernel on a CPU: forward_sm90.cu with emulator_sm90.hpp, launched by its Python."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from portattn.backends.cuda_launch import Arguments
from portattn.backends.cupy.config_sm90 import Variant
from portattn.backends.cupy.fast_launch import ForwardCall
from portattn.backends.cupy.forward_sm90 import CupyForwardSm90
from portattn.backends.cupy.loader import SOURCE_DIR
from tests.cupy.emulated import compile_library
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


class EmulatedLaunch(Arguments):
    """Launches in the emulator."""

    def __init__(self, kernel, variant: Variant, threads: int, arguments: Sequence[bytes]) -> None:
        super().__init__(arguments)
        self.kernel, self.variant, self.threads = kernel, variant, threads

    def launch(self, grid: int, stream: int) -> None:
        """The kernel of the variant, on this thread."""
        self.kernel.variants.append(self.variant)
        params, hopper = self.read(0), self.read(1)
        error = library(self.variant, self.kernel.sources).emulate(
            params, len(params), hopper, len(hopper), grid, self.threads,
            self.variant.shared_bytes(), self.kernel.next_order(),
        )  # fmt: skip
        assert error is None, error.decode()


class EmulatedForwardSm90(CupyForwardSm90):
    """Launches in the emulator instead of on a device; everything else is the kernel's own."""

    name = "sm90_emulated"
    order = FORWARD
    workers = 3
    sources = SOURCE_DIR

    def __init__(self) -> None:
        self.variants: list[Variant] = []  # of each launch

    def next_order(self) -> int:
        """The order of the next launch."""
        return self.order

    def _device_reasons(self, problem):
        return []

    def _workers(self, inputs, config):
        return self.workers

    def _make_call(self, launch, device: torch.device) -> ForwardCall:
        return ForwardCall(
            launch,
            functools.partial(EmulatedLaunch, self, launch.variant, launch.config.threads),
            lambda inputs, index: [launch.hopper(inputs, index, encode)],
            [launch.hopper_bytes()],
        )


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
