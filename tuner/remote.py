"""An executor in a process of its own, which may crash, hang or lose its device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from portattn.tuner import frames
from portattn.tuner.executor import Attempt, DeviceLostError, Entry, Executor
from portattn.tuner.verify import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from portattn.backends.base import Config, Kernel
    from portattn.tuner.cases import Case

_START_SECONDS = 120.0
# A GPU's candidates are compiled before; a CPU's may take seconds for one run.
_ATTEMPT_SECONDS = {"cuda": 10.0, "cpu": 120.0}
_MOST_LOSSES = 3  # in a row, at the start of a case or with configs that had worked


class RemoteExecutor(Executor):
    """Asks a worker process; a candidate that takes it along is a verdict, and another starts.

    Args:
        device: a torch device.
        policy: of the worker's timer: one of `measure.POLICIES`.
        attempt_seconds: a candidate that takes longer hangs; None for 10 on a GPU, 120 on a CPU.
        start: makes a worker process.
    """

    def __init__(
        self,
        device: str,
        policy: str,
        *,
        attempt_seconds: float | None = None,
        start: Callable[[], frames.Peer] | None = None,
    ) -> None:
        self.policy = policy
        self._device = device
        self._attempt_seconds = attempt_seconds or _ATTEMPT_SECONDS[device.partition(":")[0]]
        # CPU kernels use as many threads as torch does.
        self._threads = torch.get_num_threads() if device.startswith("cpu") else 0
        self._start = start or (lambda: frames.worker("measure"))
        self._peer: frames.Peer | None = None
        self._case: Case | None = None

    def begin(self, case: Case) -> None:
        """See `Executor.begin`."""
        self._case = case
        try:
            self._start_case()
        except frames.PeerLostError:
            self._peer = None
            self._restart()

    def attempt(self, kernel: Kernel, config: Config, best_ns: int | None) -> Attempt:
        """See `Executor.attempt`."""
        question = {"do": "attempt", "best_ns": best_ns, **_named(kernel, config)}
        try:
            answer = self._ask_twice(question)
        except frames.PeerLostError as error:
            self._restart()
            status = "run_timeout" if error.timed_out else "crash"
            return Attempt(Verdict(status, f"the process that ran it: {error}"))
        if "lost" in answer:
            self._restart()
            return Attempt(Verdict("launch_error", answer["lost"]))
        return Attempt(Verdict(**answer["verdict"]), tuple(answer["samples"]))

    def rounds(
        self, entries: Sequence[Entry], seconds: float, *, min_rounds: int
    ) -> list[list[int]]:
        """See `Executor.rounds`."""
        if not entries:
            return []
        question = {
            "do": "rounds",
            "entries": [
                {**_named(one.kernel, one.config), "time_ns": one.time_ns} for one in entries
            ],
            "seconds": seconds,
            "min_rounds": min_rounds,
        }
        most = _START_SECONDS + max(seconds, 0)
        for left in reversed(range(_MOST_LOSSES)):
            try:
                answer = self._ask(question, most)
            except frames.PeerLostError as error:
                why = str(error)
            else:
                if "lost" not in answer:
                    return [list(map(int, one)) for one in answer["samples"]]
                why = answer["lost"]
            if left:
                self._restart()
        raise DeviceLostError(f"configs that worked alone end their process in turns: {why}")

    def close(self) -> None:
        """See `Executor.close`."""
        if self._peer is not None:
            self._peer.end()
            self._peer = None

    def _ask_twice(self, question: dict[str, Any]) -> frames.Frame:
        """Ask again if the process was killed: that may not be this config's doing."""
        try:
            return self._ask(question, self._attempt_seconds)
        except frames.PeerLostError as error:
            if not error.was_killed:
                raise
        self._restart()
        return self._ask(question, self._attempt_seconds)

    def _ask(self, question: dict[str, Any], timeout_s: float) -> frames.Frame:
        assert self._peer is not None, "begin() comes first"
        return self._peer.ask(question, timeout_s)

    def _start_case(self) -> None:
        assert self._case is not None
        if self._peer is None:
            self._peer = self._start()
            hello = {"device": self._device, "policy": self.policy, "threads": self._threads}
            self._peer.ask(hello, _START_SECONDS)
        self._peer.ask({"do": "begin", "case": self._case.to_json()}, _START_SECONDS)

    def _restart(self) -> None:
        """A new process at the same case.

        Raises:
            DeviceLostError: it does not come up, again and again.
        """
        why = ""
        for _ in range(_MOST_LOSSES):
            self.close()
            try:
                self._start_case()
            except frames.PeerLostError as error:
                why = str(error)
            else:
                return
        self.close()
        raise DeviceLostError(
            f"no process can use {self._device} any more ({why}). What was finished before this "
            "problem is stored; look at the device (nvidia-smi) and start `portattn tune` again"
        )


def _named(kernel: Kernel, config: Config) -> dict[str, Any]:
    return {"kernel": kernel.name, "config": config.to_dict()}
