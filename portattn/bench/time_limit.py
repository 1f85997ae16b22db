"""A limit on how long a piece of Python may take: what compiles or waits too long is given up."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_AGAIN_SECONDS = 5.0  # someone in between may have caught it


class TimeLimitError(BaseException):
    """It took too long. Not an Exception: compilers catch those and go on."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise inside the block once it has run for some seconds.

    It reaches Python code of the main thread, and a C call once that returns; in another thread
    there is no limit.

    Args:
        seconds: 0 or less raises at once.

    Raises:
        TimeLimitError: the time is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if seconds <= 0:
        raise TimeLimitError("no time was left")

    def stop(number: int, frame: object) -> None:
        raise TimeLimitError(f"did not finish in {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
