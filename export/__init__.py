"""ONNX: export a module with portattn attention, and run the file with or without libportattn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portattn.export.exporter import ExportInfo, to_onnx
    from portattn.export.sessions import OnnxSession, session

__all__ = ["ExportInfo", "OnnxSession", "session", "to_onnx"]

_MODULES = {
    "ExportInfo": "exporter",
    "to_onnx": "exporter",
    "OnnxSession": "sessions",
    "session": "sessions",
}


def __getattr__(name: str) -> object:
    """Load onnx and onnxruntime on first use only; they are optional.

    Raises:
        ExportError: a package of the extra "export" is missing.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from portattn.errors import ExportError

    try:
        module = importlib.import_module(f"portattn.export.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        raise ExportError(
            f"portattn.export.{name} needs the package {error.name}: pip install "
            "'portattn[export]'"
        ) from error
    found: object = getattr(module, name)
    return found
