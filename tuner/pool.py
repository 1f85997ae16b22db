"""Compiles configs in many processes at once, ahead of the one that measures."""

from __future__ import annotations

import dataclasses
import itertools
import os
import queue
import threading
from typing import TYPE_CHECKING, Any

from portattn.tuner import frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from portattn.backends.base import Config, Kernel
    from portattn.device import DeviceKey
    from portattn.tuner.cases import Case

MAX_PROCESSES = 32
COMPILE_SECONDS = 60.0
_START_SECONDS = 120.0
_MOST_STARTS = 3


@dataclasses.dataclass(eq=False)
class Compilation:
    """One config on its way through the pool.

    Attributes:
        case, kernel, config: what to compile.
        ready: set when the fields below are final.
        status: ``"ok"``, ``"compile_error"``, ``"compile_timeout"`` or ``"crash"``.
        reason: why it is not ok.
        code: a digest: equal for configs that do the same on the device.
        compile_ns: time it took; little where the code was compiled before.
        cancelled: nobody wants it any more.
        was_killed: SIGKILL ended its process.
    """

    case: dict[str, Any]
    kernel: str
    config: dict[str, int | bool | str]
    ready: threading.Event = dataclasses.field(default_factory=threading.Event)
    status: str = ""
    reason: str = ""
    code: str = ""
    compile_ns: int = 0
    cancelled: bool = False
    was_killed: bool = False


def processes() -> int:
    """How many compilers run at once: the cores but one, which the measuring process needs."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(cores - 1, MAX_PROCESSES))


class CompilePool:
    """Worker processes, each compiling one config at a time. Use as a context manager.

    A compiler that hangs is killed with its group, one that crashes is replaced: both are the
    config's verdict.

    Args:
        device: what to compile for.
        count: of processes; they start with the first config.
        seconds: a compilation that takes longer hangs.
        start: makes a process.
    """

    def __init__(
        self,
        device: DeviceKey,
        count: int | None = None,
        *,
        seconds: float = COMPILE_SECONDS,
        start: Callable[[], frames.Peer] | None = None,
    ) -> None:
        self.count = processes() if count is None else count
        self._hello = {"device": dataclasses.asdict(device)}
        self._seconds = seconds
        self._start = start or (lambda: frames.worker("compile", {"CUDA_VISIBLE_DEVICES": ""}))
        self._jobs: queue.PriorityQueue[tuple[int, int, Compilation | None]] = (
            queue.PriorityQueue()
        )
        self._numbers = itertools.count()
        self._threads: list[threading.Thread] = []
        self._peers: set[frames.Peer] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self.finished = threading.Condition()
        self.problem = ""  # why no process can be started; configs then stay without a status

    def submit(self, case: Case, kernel: Kernel, config: Config, priority: int) -> Compilation:
        """Compile a config as soon as a process is free.

        Args:
            case, kernel, config: what; the kernel is of the registry.
            priority: smaller ones go first.
        """
        job = Compilation(case.to_json(), kernel.name, config.to_dict())
        self._jobs.put((priority, next(self._numbers), job))
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._serve, name=f"compile-{i}", daemon=True)
                for i in range(self.count)
            ]
            for thread in self._threads:
                thread.start()
        return job

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits for a process."""
        return self._jobs.empty()

    def close(self) -> None:
        """End every process; what was not compiled stays undone."""
        with self._lock:
            self._is_closed = True
            peers = list(self._peers)
        for peer in peers:
            peer.kill()
        for _ in self._threads:
            self._jobs.put((-1, next(self._numbers), None))
        for thread in self._threads:
            thread.join()
        self._threads = []

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _serve(self) -> None:
        """One thread: it feeds one process, and keeps it alive by existing."""
        peer: frames.Peer | None = None
        while True:
            _, _, job = self._jobs.get()
            if job is None or self._is_closed:
                break
            if not job.cancelled:
                peer = self._compile(peer, job)
                if job.was_killed and not self._is_closed:  # once more: by whom is not known
                    peer = self._compile(None, job)
            job.ready.set()
            with self.finished:
                self.finished.notify_all()
        if peer is not None:
            peer.end()

    def _compile(self, peer: frames.Peer | None, job: Compilation) -> frames.Peer | None:
        """Fill in a job; the process for the next one, None if this one ended it."""
        if peer is None:
            try:
                peer = self._begin()
            except frames.PeerLostError as error:
                self.problem = str(error)
                return None
        try:
            question = {"case": job.case, "kernel": job.kernel, "config": job.config}
            answer = peer.ask(question, self._seconds)
        except frames.PeerLostError as error:
            job.status = "compile_timeout" if error.timed_out else "crash"
            job.reason = f"the compiling process: {error}"
            job.was_killed = error.was_killed
            with self._lock:
                self._peers.discard(peer)
            return None
        job.status, job.reason = answer["status"], answer.get("reason", "")
        job.code, job.compile_ns = answer.get("code", ""), answer.get("compile_ns", 0)
        return peer

    def _begin(self) -> frames.Peer:
        """A process that is ready; one killed before that is replaced.

        Raises:
            PeerLostError: none comes up.
        """
        for left in reversed(range(_MOST_STARTS)):
            peer = self._start()
            with self._lock:
                self._peers.add(peer)
                is_closed = self._is_closed
            if is_closed:
                peer.kill()
            try:
                peer.ask(self._hello, _START_SECONDS)
            except frames.PeerLostError as error:
                with self._lock:
                    self._peers.discard(peer)
                if not left or is_closed or not error.was_killed:
                    raise
            else:
                return peer
        raise AssertionError("the last start returns or raises")
