"""Processes that the tuner talks to: one JSON object a line over pipes, and never pickle.

A `Peer` is ended by its process group, so that a hung compiler or kernel takes nothing with it but
itself; it dies with its parent too.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, Any

from portattn.errors import TuningError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Frame = dict[str, Any]
MAX_FRAME_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 20
_EXIT_SECONDS = 2.0
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class PeerLostError(Exception):
    """The process ended, or did not answer in time; the text says which.

    Attributes:
        timed_out: it did not answer.
        was_killed: SIGKILL ended it: no crash; perhaps its own doing, perhaps the machine's.
    """

    def __init__(self, text: str, *, timed_out: bool, was_killed: bool = False) -> None:
        super().__init__(text)
        self.timed_out, self.was_killed = timed_out, was_killed


def write(stream: IO[bytes], frame: Mapping[str, Any]) -> None:
    """Send one frame."""
    stream.write(json.dumps(frame, separators=(",", ":")).encode() + b"\n")
    stream.flush()


def read(stream: IO[bytes]) -> Frame | None:
    """Wait for one frame; None at the end of the stream."""
    line = stream.readline(MAX_FRAME_BYTES)
    return _parse(line) if line.endswith(b"\n") else None


def _parse(line: bytes) -> Frame:
    frame = json.loads(line)
    if not isinstance(frame, dict):
        raise ValueError("a frame is a JSON object")
    return frame


class Peer:
    """A process that answers each frame with one frame.

    Args:
        command: its program and arguments.
        environment: variables beside those of this process.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        # stderr stays the user's: what a compiler or driver says before it dies is seen.
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        self._buffer = bytearray()

    def ask(self, frame: Mapping[str, Any], timeout_s: float) -> Frame:
        """Send a frame and wait for the answer.

        Raises:
            PeerLostError: no answer came; the process has been ended.
        """
        assert self._process.stdin is not None
        try:
            write(self._process.stdin, frame)
        except (OSError, ValueError) as error:  # a closed pipe, a closed stream
            raise self._lost(f"it ended before it was asked ({error})") from error
        return self._answer(time.monotonic() + timeout_s, timeout_s)

    def _answer(self, deadline: float, timeout_s: float) -> Frame:
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        while True:
            end = self._buffer.find(b"\n")
            if end >= 0:
                line = bytes(self._buffer[: end + 1])
                del self._buffer[: end + 1]
                try:
                    return _parse(line)
                except ValueError as error:
                    raise self._lost(f"it said something that is no frame ({error})") from error
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise self._lost(f"no answer in {timeout_s:.0f} s", timed_out=True)
            chunk = os.read(handle, _CHUNK_BYTES)
            if not chunk or len(self._buffer) > MAX_FRAME_BYTES:
                raise self._lost("")
            self._buffer += chunk

    def _lost(self, text: str, *, timed_out: bool = False) -> PeerLostError:
        # Its own end tells more than ours: a process closes its pipes before it is gone.
        is_own_end = not timed_out and self._ends_soon()
        self.end()
        code = self._process.returncode
        how = f"it ended by signal {-code}" if code < 0 else f"it exited with {code}"
        was_killed = is_own_end and code == -signal.SIGKILL
        return PeerLostError(text or how, timed_out=timed_out, was_killed=was_killed)

    def _ends_soon(self) -> bool:
        """Wait for its end, without freeing its number, which is that of its group too."""
        deadline = time.monotonic() + _EXIT_SECONDS
        options = os.WEXITED | os.WNOWAIT | os.WNOHANG
        while self._process.returncode is None:
            if os.waitid(os.P_PID, self._process.pid, options) is not None:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def kill(self) -> None:
        """Kill the process and all that it started; whoever waits for an answer is told."""
        if self._process.returncode is not None:
            return  # waited for: its number may be another's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # The group outlives its leader as long as a compiler that it started runs.
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the process and all that it started, and wait for it."""
        self.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def worker(role: str, environment: Mapping[str, str] | None = None) -> Peer:
    """A process of `portattn.tuner.worker`."""
    return Peer([sys.executable, "-m", "portattn.tuner.worker", role], environment)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that ends."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:  # it ended before the call
        raise TuningError("the tuner that started this process is gone")


def own_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """A worker's ends of the pipes; what others print to standard output goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return sys.stdin.buffer, answers
