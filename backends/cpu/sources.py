"""Which files make up the CPU kernels."""

from __future__ import annotations

from pathlib import Path


def source_files(module: str) -> list[str]:
    """The module and, in a checkout, the C++ beside it.

    An installed wheel has only the library built from it.
    """
    csrc = Path(__file__).resolve().parent / "csrc"
    return [module, *(str(path) for path in sorted(csrc.glob("*.[ch]*")))]
