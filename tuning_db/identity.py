"""Fingerprints: what must be equal for a stored measurement to still be an answer."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from portattn.device import DeviceKey

# Distributions whose exact versions are recorded with each measurement.
_RECORDED = {
    "portattn": ("portattn",),
    "torch": ("torch",),
    "triton": ("triton",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "nvrtc": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12"),
}

# C, C++ and CUDA: strings and characters are kept, comments dropped.
_C_TOKENS = re.compile(
    r'("(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')|/\*.*?\*/|//[^\n]*', re.DOTALL
)


def canonical_json(value: object) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal text."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def sha256(value: object) -> str:
    """The hex SHA-256 of a JSON value's canonical text."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if not isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ):
            continue
        first = node.body[0] if node.body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            node.body = node.body[1:]
    return tree


def _normalised(path: Path) -> str:
    """The file's text without comments, docstrings, blank lines and line numbers."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return "absent"  # not in a wheel; the library's version stands in the toolchain
    if path.suffix == ".py":
        return ast.dump(_without_docstrings(ast.parse(text)))
    text = _C_TOKENS.sub(lambda match: match.group(1) or " ", text)
    return "\n".join(line for line in (" ".join(raw.split()) for raw in text.splitlines()) if line)


def source_sha256(files: Iterable[str | Path]) -> str:
    """The identity of a kernel's source.

    Moving, reformatting or commenting code does not change it.

    Args:
        files: the kernel's files, Python or C-like, in any order.
    """
    parts = sorted((Path(file).name, _normalised(Path(file))) for file in files)
    return sha256(parts)


@functools.lru_cache(maxsize=64)
def source_of_files(files: tuple[str, ...]) -> str:
    """`source_sha256`, once per process for the same files."""
    return source_sha256(files)


def space_sha256(space: Mapping[str, Sequence[Any]]) -> str:
    """The identity of a declared search space."""
    return sha256({name: list(values) for name, values in space.items()})


@functools.cache
def package_version(distribution: str) -> str:
    """The installed version of a distribution, or "" if it is absent."""
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _recorded(column: str) -> str:
    """The version of the first distribution of a column that is installed, or ""."""
    return next(filter(None, map(package_version, _RECORDED[column])), "")


@functools.cache
def toolchain_class(backend: str) -> str:
    """What generates a backend's code, as coarse as it changes speed.

    A row of another class is only a candidate.
    """
    if backend == "triton":  # its compiler changes with every minor version
        return f"triton-{'.'.join(_recorded('triton').split('.')[:2])}"
    if backend == "cupy":  # CUDA's compiler, which may also be a toolkit's: then CuPy's version
        nvrtc = _recorded("nvrtc").split(".")[0]
        return f"nvrtc-{nvrtc}" if nvrtc else f"cupy-{_recorded('cupy').split('.')[0]}"
    return f"native-{package_version('portattn') or 'source'}"


@functools.cache
def toolchain() -> dict[str, str]:
    """The exact versions of this process, as columns of table ``toolchain``."""
    import platform

    columns = {column: _recorded(column) for column in _RECORDED}
    columns |= dict.fromkeys(("ptxas", "driver", "compiler_cpu"), "")
    columns["python_minor"] = ".".join(platform.python_version_tuple()[:2])
    torch_version = columns["torch"]
    columns["cuda_runtime"] = torch_version.partition("+")[2] if "+" in torch_version else ""
    return columns


def device_columns(device: DeviceKey) -> dict[str, Any]:
    """A device key as the columns of table ``device``.

    Clocks, power and MIG profile are 0 or "": not known.
    """
    on_cpu = device.kind == "cpu"
    return {
        "fp_sha256": device.fingerprint,
        "vendor": device.vendor,
        "kind": device.kind,
        "name": device.name,
        "arch": device.arch,
        "sm_count": 0 if on_cpu else device.cores,
        "smem_optin_bytes": device.shared_memory_bytes,
        "regs_per_sm": device.registers,
        "l2_bytes": device.l2_bytes,
        "l3_bytes": device.l3_bytes,
        "mem_bytes": device.memory_bytes,
        "mem_clock_khz": 0,
        "sm_clock_max_khz": 0,
        "power_limit_mw": 0,
        "mig_profile": "",
        "cores": device.cores if on_cpu else 0,
        "threads_used": device.threads,
        "isa_json": canonical_json(list(device.isa)),
        "family": device.family,
    }
