"""One attention call; any mask; any device; the fastest kernel for that device."""

from portattn import errors, masks
from portattn.api import attention
from portattn.explanation import Explanation, explain

__all__ = ["Explanation", "attention", "errors", "explain", "masks"]
__version__ = "0.1.0"
