"""The CuPy kernel on a CPU: forward_sm80.cu with emulator.hpp, launched by its own Python."""

import ctypes
import functools
import subprocess
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from portattn.backends.cuda_launch import Launch
from portattn.backends.cupy.config import Variant
from portattn.backends.cupy.forward_sm80 import CupyForwardSm80
from portattn.backends.cupy.loader import SOURCE_DIR
from tests.cupy.emulated_driver import emulated_launch, run_emulated

HERE = Path(__file__).parent
CAPABILITY = (8, 6)
# Orders of emulator_core.hpp: in sequence with copies at once; all reversed with copies as late
# as allowed.
EARLY, LATE = 0, 7


@functools.cache
def _build_folder() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="portattn_emulated_")


def compile_library(source: str, defines: Mapping[str, int], include: Path) -> Path:
    """A .cpp file of this folder as a shared library."""
    name = "_".join(str(value) for value in defines.values())
    folder = Path(_build_folder().name)
    path = folder / f"{Path(source).stem}_{zlib.crc32(bytes(include))}_{name}.so"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    # _FORTIFY_SOURCE's longjmp refuses to switch stacks.
    command += [
        "-U_FORTIFY_SOURCE",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
    ]
    # Fragments that a variant reads from shared memory again are declared and never touched.
    command += ["-Wno-maybe-uninitialized"]
    command += [f"-I{include}", f"-I{HERE}", *(f"-D{k}={v}" for k, v in defines.items())]
    command += [str(HERE / source), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


@functools.cache
def library(variant: Variant, sources: Path = SOURCE_DIR) -> ctypes.CDLL:
    """The variant as a shared library, compiled once per process."""
    path = compile_library("emulate_forward.cpp", dict(variant.defines()), sources)
    loaded = ctypes.CDLL(str(path))
    loaded.emulate.restype = ctypes.c_char_p
    loaded.emulate.argtypes = [ctypes.c_char_p, ctypes.c_int64] + [ctypes.c_int] * 4
    return loaded


class EmulatedForwardSm80(CupyForwardSm80):
    """Launches in the emulator instead of on a device; everything else is the kernel's own."""

    name = "cupy_emulated"
    order = EARLY
    workers = 8
    sources = SOURCE_DIR

    def __init__(self) -> None:
        self.variants: list[Variant] = []  # of each launch

    def _device_reasons(self, problem):
        return []

    def _capability(self, problem):
        return CAPABILITY

    def _workers(self, inputs, config):
        return self.workers

    def _make_launch(
        self, variant: Variant, device: torch.device, arguments: Sequence[bytes]
    ) -> Launch:
        threads = 32 * variant.config.num_warps

        def emulate(grid: int, parameters: list[bytes]) -> bytes | None:
            self.variants.append(variant)
            (params,) = parameters
            return library(variant, self.sources).emulate(
                params, len(params), grid, threads, variant.shared_bytes(), self.order
            )

        return emulated_launch(emulate, arguments, threads)

    def run(self, inputs, config):
        """In the emulator, on this thread."""
        return run_emulated(super().run, inputs, config)


class ReversedForwardSm80(EmulatedForwardSm80):
    """Blocks and threads from last to first, copies as late as the waits allow."""

    name = "cupy_emulated_reversed"
    order = LATE
