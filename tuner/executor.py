"""Who judges a candidate: the same driver runs them here, in another process, or from a table.

An `Executor` is told the case, then asked to verify and time single configs of it, and at the end
to time some of them in turns.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from typing import TYPE_CHECKING

import torch

from portattn.errors import TuningError
from portattn.tuner import measure
from portattn.tuner.verify import Verdict, Verifier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.backends.base import Config, Kernel
    from portattn.tuner.cases import Case
    from portattn.tuner.timers import Timer


class DeviceLostError(TuningError):
    """A candidate left the device unusable for this process: later verdicts would be wrong."""


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """What trying one config found.

    Attributes:
        verdict: whether it is right; also what went wrong while it was timed.
        samples: times in ns; empty unless the verdict is ok.
    """

    verdict: Verdict
    samples: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One config in the rounds that decide.

    Attributes:
        kernel, config: what runs.
        time_ns: about how long it takes.
    """

    kernel: Kernel
    config: Config
    time_ns: int


class Executor(abc.ABC):
    """Verifies and times configs of one case after the other. One thread.

    Attributes:
        policy: how it times: part of the key that results are stored under.
    """

    policy: str

    @abc.abstractmethod
    def begin(self, case: Case) -> None:
        """Take up a case: what follows is about it."""

    @abc.abstractmethod
    def attempt(self, kernel: Kernel, config: Config, best_ns: int | None) -> Attempt:
        """Verify one config and, only if it is right, time it; never raises for what it does.

        Args:
            kernel, config: what to try; it may hang or crash.
            best_ns: the kernel's best so far: a much slower one is sampled less.

        Raises:
            DeviceLostError: nothing can be measured any more.
        """

    @abc.abstractmethod
    def rounds(
        self, entries: Sequence[Entry], seconds: float, *, min_rounds: int
    ) -> list[list[int]]:
        """Time configs that passed in turns.

        Args:
            entries: what to time.
            seconds: no round begins after this, but min_rounds are always done.
            min_rounds: bound from below.

        Returns:
            For each entry its samples in ns, one a round.

        Raises:
            DeviceLostError: nothing can be measured any more.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the device."""


class LocalExecutor(Executor):
    """In this process: right for CPU kernels, and what a worker process runs for a GPU.

    Args:
        timer: how to time.
    """

    def __init__(self, timer: Timer) -> None:
        self.policy = timer.policy
        self._timer = timer
        self._verifier: Verifier | None = None

    def begin(self, case: Case) -> None:
        """See `Executor.begin`."""
        self._verifier = None  # its tensors go before the next case's come
        with torch.no_grad():
            self._verifier = Verifier(case)

    def attempt(self, kernel: Kernel, config: Config, best_ns: int | None) -> Attempt:
        """See `Executor.attempt`."""
        verifier = self._case()
        with torch.no_grad():
            verdict = verifier.check(kernel, config)
            samples: list[int] = []
            if verdict.status == "ok":
                try:
                    samples = measure.screen(
                        self._timer, lambda: kernel.run(verifier.inputs, config), best_ns=best_ns
                    )
                except Exception as error:  # as in Verifier.check: it ends the candidate only
                    text = f"while timed: {type(error).__name__}: {str(error)[:1500]}"
                    verdict = Verdict("launch_error", text)
                else:
                    verdict = verifier.after_timing(verdict)
        if verdict.status != "ok":
            self._check_device(config)
        return Attempt(verdict, tuple(samples) if verdict.status == "ok" else ())

    def rounds(
        self, entries: Sequence[Entry], seconds: float, *, min_rounds: int
    ) -> list[list[int]]:
        """See `Executor.rounds`."""
        inputs = self._case().inputs
        runs = [
            lambda kernel=entry.kernel, config=entry.config: kernel.run(inputs, config)
            for entry in entries
        ]
        with torch.no_grad():
            return measure.interleave(
                self._timer,
                runs,
                [entry.time_ns for entry in entries],
                deadline=time.monotonic() + seconds,
                min_rounds=min_rounds,
            )

    def close(self) -> None:
        """See `Executor.close`."""
        self._verifier = None

    def _case(self) -> Verifier:
        assert self._verifier is not None, "begin() comes first"
        return self._verifier

    def _check_device(self, config: Config) -> None:
        device = self._case().inputs.query.device
        if device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(device)
            torch.ones(1, device=device).add_(1)
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLostError(
                f"the device is unusable after config {config}: {str(error)[:300]}. What was "
                "finished before this problem is stored; start `portattn tune` again"
            ) from error
