"""The CuPy kernel on a CPU: forward_sm80.cu with emulator.hpp, launched by its own Python."""

import ctypes
import functools
import subprocess
import tempfile
import zlib
from pathlib import Path

import torch

from portattn.backends.cupy.config import Variant
from portattn.backends.cupy.forward_sm80 import CupyForwardSm80
from portattn.backends.cupy.loader import SOURCE_DIR

HERE = Path(__file__).parent
CAPABILITY = (8, 6)
# Orders of emulate_forward.cpp: in sequence with copies at once; all reversed with copies as late
# as allowed.
EARLY, LATE = 0, 7


@functools.cache
def _build_folder() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="portattn_emulated_")


@functools.cache
def library(variant: Variant, sources: Path = SOURCE_DIR) -> ctypes.CDLL:
    """The variant as a shared library, compiled once per process."""
    name = "_".join(str(value) for _, value in variant.defines())
    path = Path(_build_folder().name) / f"{zlib.crc32(bytes(sources))}_{name}.so"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    # _FORTIFY_SOURCE's longjmp refuses to switch stacks.
    command += ["-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # Fragments that a variant reads from shared memory again are declared and never touched.
    command += ["-Wno-maybe-uninitialized"]
    command += [f"-I{sources}", f"-I{HERE}", *(f"-D{k}={v}" for k, v in variant.defines())]
    command += [str(HERE / "emulate_forward.cpp"), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(path))
    loaded.emulate.restype = None
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

    def _launch(self, variant: Variant, grid: int, params: bytes, device: torch.device) -> None:
        self.variants.append(variant)
        threads = 32 * variant.config.num_warps
        library(variant, self.sources).emulate(
            params, len(params), grid, threads, variant.shared_bytes(), self.order
        )


class ReversedForwardSm80(EmulatedForwardSm80):
    """Blocks and threads from last to first, copies as late as the waits allow."""

    name = "cupy_emulated_reversed"
    order = LATE
