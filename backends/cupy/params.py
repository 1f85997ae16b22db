"""The kernel's argument: the struct of params.cuh, which is the only list of its fields."""

from __future__ import annotations

import functools
import re
import struct
from typing import TYPE_CHECKING

from portattn.backends.cupy.loader import SOURCE_DIR

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_FIELD = re.compile(r"^    (?P<type>[a-z][a-z ]*?\*?) (?P<name>\w+);", re.MULTILINE)
_FORMATS = {"long long": "q", "int": "i", "float": "f"}


@functools.cache
def layout(header: str = "params.cuh") -> tuple[tuple[str, ...], struct.Struct]:
    """Names of the fields of a header's struct in order, and how they are packed.

    8-byte fields come first, so that C's padding is at the end only.
    """
    fields = _FIELD.findall((SOURCE_DIR / header).read_text(encoding="utf-8"))
    formats = ["Q" if kind.endswith("*") else _FORMATS[kind] for kind, _ in fields]
    packing = "=" + "".join(formats)
    size = struct.calcsize(packing)
    return tuple(name for _, name in fields), struct.Struct(packing + "x" * (-size % 8))


@functools.cache
def offset_of(name: str, header: str = "params.cuh") -> int:
    """Where a field starts in a header's struct, in bytes."""
    names, packing = layout(header)
    count = names.index(name)
    return struct.calcsize(packing.format[: 1 + count])


def pack(values: Mapping[str, int | float], header: str = "params.cuh") -> bytes:
    """The struct's bytes; every field must be given."""
    names, packing = layout(header)
    return packing.pack(*[values[name] for name in names])


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
