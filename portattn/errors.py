"""Every error that portattn raises on purpose.

Each message names the argument, its value, what is allowed, and one way out.
"""

from collections.abc import Mapping, Sequence


class PortattnError(Exception):
    """Base of all portattn errors."""


class ShapeError(PortattnError, ValueError):
    """A tensor argument has a wrong rank, size, dtype, layout or device."""


class MaskError(PortattnError, ValueError):
    """A mask is malformed or does not fit the lengths, heads or batch of the call."""


class ConfigError(PortattnError, ValueError):
    """A config or option has a value that the kernel cannot run."""


class TuningError(PortattnError, RuntimeError):
    """Tuning could not produce a result."""


class ExportError(PortattnError, RuntimeError):
    """A module cannot be exported to ONNX as asked."""


class NativeLibraryError(PortattnError, RuntimeError):
    """libportattn is missing, cannot be loaded, or speaks another ABI version."""


class UnsupportedError(PortattnError, RuntimeError):
    """No kernel can run this call.

    Attributes:
        reasons: kernel name -> the reasons why it refused, all of them.
    """

    def __init__(self, message: str, reasons: Mapping[str, Sequence[str]] | None = None) -> None:
        self.reasons = {name: list(why) for name, why in (reasons or {}).items()}
        lines = [message]
        for name, why in self.reasons.items():
            lines.append(f"  {name}: {'; '.join(why)}")
        super().__init__("\n".join(lines))
