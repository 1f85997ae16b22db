"""What a compiled Triton or Gluon kernel takes, read from Triton 3.6 and 3.9's own objects."""

from __future__ import annotations

import ctypes
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAP_BYTES = 128  # sizeof(CUtensorMap)


def is_simple(compiled: Any) -> bool:  # noqa: ANN401
    """Whether the kernel takes its arguments and nothing else, in one plain launch."""
    meta = getattr(compiled, "metadata", None)
    if meta is None:
        return False
    special = (
        "launch_pdl",
        "launch_cooperative_grid",
        "global_scratch_size",
        "profile_scratch_size",
        "instrumentation_mode",
    )
    return (
        compiled.packed_metadata[1] == 1
        and not any(getattr(meta, name, None) for name in special)
        and all(isinstance(kind, str) for kind in compiled.src.signature.values())
    )


def address(argument: Any) -> int:  # noqa: ANN401  # a tensor, an address or None
    """Where an argument lies in the device's memory; 0 for None."""
    if argument is None:
        return 0
    return int(argument) if isinstance(argument, int) else int(argument.data_ptr())


def aligned(compiled: Any) -> set[int]:  # noqa: ANN401
    """Positions of the parameters that the kernel was specialised for as multiples of 16."""
    return {
        path[0]
        for path, attributes in (compiled.src.attrs or {}).items()
        if any(name == "tt.divisibility" for name, _ in attributes)
    }


def map_bytes(descriptor: Any, form: Mapping[str, Any]) -> bytes | None:  # noqa: ANN401
    """The tensor map that Triton makes of a descriptor; None if its object is not as known.

    The map lies behind the object's header, aligned to 128 bytes (backends/nvidia/driver.c).
    """
    from triton.backends.nvidia import driver

    more = (None,) * (len(inspect.signature(driver.make_tensordesc_arg).parameters) - 2)
    made: object = driver.make_tensordesc_arg(descriptor, form, *more)[0]
    known = type(made).__basicsize__ == 2 * _MAP_BYTES and id(made) % _MAP_BYTES == 0
    return ctypes.string_at(id(made) + _MAP_BYTES, _MAP_BYTES) if known else None
