"""From CUDA sources to a loaded function: NVRTC, and caches on disk and in memory.

CuPy's own `RawModule` takes the architecture from the device and needs one to compile at all.
Calling NVRTC here instead compiles on machines without a GPU too (the tests do), for any
architecture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from portattn.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCE_DIR = Path(__file__).parent
HEADERS = (
    "config.cuh",
    "epilogue.cuh",
    "matmul.cuh",
    "memory.cuh",
    "params.cuh",
    "ptx.cuh",
    "schedule.cuh",
    "scores.cuh",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """One kernel variant to compile.

    Attributes:
        source: file name of the .cu file in this folder.
        entry: name of its ``extern "C"`` kernel.
        defines: macro name -> value; sorted, so that equal programs compare equal.
        arch: NVRTC's real architecture, e.g. ``"sm_90"``.
        headers: file names of the headers that it includes.
        generated: names and texts of headers that are written for this program.
    """

    source: str
    entry: str
    defines: tuple[tuple[str, int], ...]
    arch: str
    headers: tuple[str, ...] = HEADERS
    generated: tuple[tuple[str, str], ...] = ()

    def options(self) -> tuple[str, ...]:
        """NVRTC's options. ptxas reports registers and spills into the log."""
        defines = tuple(f"-D{name}={value}" for name, value in self.defines)
        return (f"--gpu-architecture={self.arch}", "--std=c++17", "--ptxas-options=-v", *defines)


@dataclasses.dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas says about a compiled kernel; bytes are per thread."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """A cubin and NVRTC's log."""

    cubin: bytes
    log: str

    def resources(self) -> Resources:
        """Parse ptxas's report.

        Raises:
            ValueError: the log has no report.
        """
        used = re.search(r"Used (\d+) registers", self.log)
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", self.log
        )
        if used is None or frame is None:
            raise ValueError(f"no ptxas report in NVRTC's log: {self.log!r}")
        return Resources(int(used[1]), int(frame[1]), int(frame[2]), int(frame[3]))


@functools.cache
def nvrtc_problem() -> str | None:
    """Why NVRTC cannot be used; None if it can."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # CuPy raises whatever its search for the library raised.
        return (
            f"CuPy finds no NVRTC library ({error}); install cupy-cuda13x[ctk] or a CUDA toolkit"
        )
    return None


@functools.cache
def _read(name: str) -> str:
    return (SOURCE_DIR / name).read_text(encoding="utf-8")


def compile_program(program: Program) -> Compiled:
    """Compile with NVRTC, to a cubin for `program.arch`. Needs no GPU.

    Raises:
        UnsupportedError: NVRTC is missing or refuses the program; the message has its log.
    """
    problem = nvrtc_problem()
    if problem is not None:
        raise UnsupportedError(problem)
    from cupy.cuda import nvrtc

    # The binding wants bytes for headers and their names, str for the rest.
    headers = [_read(name).encode() for name in program.headers]
    headers += [text.encode() for _, text in program.generated]
    names = [name.encode() for name in program.headers]
    names += [name.encode() for name, _ in program.generated]
    handle = nvrtc.createProgram(_read(program.source), program.source, headers, names)
    try:
        try:
            nvrtc.compileProgram(handle, program.options())
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(handle)
            raise UnsupportedError(
                f"NVRTC {nvrtc.getVersion()} cannot compile {program.source} for {program.arch}: "
                f"{error}\n{log}"
            ) from error
        # The binding drops the last byte, a zero; disassemblers then refuse the file.
        cubin = bytes(nvrtc.getCUBIN(handle)) + b"\0"
        return Compiled(cubin, str(nvrtc.getProgramLog(handle)))
    finally:
        nvrtc.destroyProgram(handle)


def cache_key(program: Program) -> str:
    """Name of the program's cubin: a hash of the sources, the options and NVRTC's version."""
    from cupy.cuda import nvrtc

    digest = hashlib.sha256()
    texts = [_read(name) for name in (program.source, *program.headers)]
    texts += [text for _, text in program.generated]
    for part in (*texts, *program.options(), str(nvrtc.getVersion())):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def default_cache_dir() -> Path:
    """Where cubins are kept."""
    return Path(platformdirs.user_cache_dir("portattn")) / "cubin"


def cached_cubin(program: Program, cache_dir: Path | None = None) -> bytes:
    """The cubin, from disk if compiled before. A cache that cannot be used is passed over."""
    path = (cache_dir or default_cache_dir()) / f"{cache_key(program)}.cubin"
    with contextlib.suppress(OSError):
        stored = path.read_bytes()
        # An ELF file; an empty or foreign one is compiled anew.
        if stored.startswith(b"\x7fELF"):
            return stored
    cubin = compile_program(program).cubin
    with contextlib.suppress(OSError):
        _write_atomically(path, cubin)
    return cubin


def _write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target and rename, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


_functions: dict[tuple[Program, int], Callable[..., None]] = {}
_lock = threading.Lock()


def load_function(program: Program, device_index: int, shared_bytes: int) -> Callable[..., None]:
    """The program's kernel on a device, a `cupy.cuda.Function`; loaded once per process.

    Programs are a closed list (dtypes, padded head dims, features, configs), so the cache is
    bounded by it.

    Args:
        program: what to load.
        device_index: CUDA device; must be the current device.
        shared_bytes: dynamic shared memory that launches will ask for.
    """
    key = (program, device_index)
    function = _functions.get(key)
    if function is not None:
        return function
    loaded = _load(program, shared_bytes)  # not under the lock: it may compile for seconds
    with _lock:
        return _functions.setdefault(key, loaded)


def _load(program: Program, shared_bytes: int) -> Callable[..., None]:
    import cupy

    module = cupy.cuda.Module()
    module.load(cached_cubin(program))
    function: Callable[..., None] = module.get_function(program.entry)  # keeps its module alive
    driver = cupy.cuda.driver
    attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    driver.funcSetAttribute(function.ptr, attribute, shared_bytes)  # type: ignore[attr-defined]
    return function
