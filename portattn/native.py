"""Loads libportattn, the C++ library with the planner, the CPU kernels and the ONNX Runtime op."""

import ctypes
import functools
import importlib.resources
import os
from collections.abc import Callable
from pathlib import Path

from portattn.errors import NativeLibraryError

ABI_VERSION = 1
_ERROR_BYTES = 1024


def library_path() -> Path:
    """The path of libportattn: ``PORTATTN_LIBRARY`` if set, else the file inside the package."""
    override = os.environ.get("PORTATTN_LIBRARY")
    if override:
        return Path(override)
    return Path(str(importlib.resources.files("portattn").joinpath("libportattn.so")))


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, checked against the ABI version that this package speaks.

    Raises:
        NativeLibraryError: the file is missing, cannot be loaded, or has another ABI version.
    """
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeLibraryError(
            f"libportattn cannot be loaded from {path}: {error}. Install portattn with pip (which "
            "builds it), or point PORTATTN_LIBRARY at a built libportattn.so"
        ) from error
    loaded.portattn_abi_version.restype = ctypes.c_uint32
    version = int(loaded.portattn_abi_version())
    if version != ABI_VERSION:
        raise NativeLibraryError(
            f"libportattn at {path} has ABI version {version}, this package needs {ABI_VERSION}. "
            "Reinstall portattn, or unset PORTATTN_LIBRARY"
        )
    return loaded


def error_buffer() -> "ctypes.Array[ctypes.c_char]":
    """A buffer for the error message of one native call."""
    return ctypes.create_string_buffer(_ERROR_BYTES)


class Handle:
    """Something that the library made, destroyed with this.

    Attributes:
        address: of it.
    """

    __slots__ = ("_destroy", "address")

    def __init__(self, address: int, destroy: Callable[[int], object]) -> None:
        """Take ownership."""
        self.address, self._destroy = address, destroy

    def __del__(self) -> None:
        self._destroy(self.address)
