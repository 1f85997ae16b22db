"""One kernel on one problem: its space, its search, and what it sends to the finals."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from portattn.errors import ConfigError, TuningError
from portattn.tuner import measure
from portattn.tuner.search import Search
from portattn.tuner.space import enumerate_space
from portattn.tuner.verify import Verdict, Verifier
from portattn.tuning_db import lookup
from portattn.tuning_db.identity import source_of_files, space_sha256, toolchain_class
from portattn.tuning_db.records import Measurement

if TYPE_CHECKING:
    from portattn.backends.base import Config, Kernel
    from portattn.device import DeviceKey
    from portattn.problem import AttentionProblem
    from portattn.tuning_db.key import ProblemKey
    from portattn.tuning_db.store import Store

FINALISTS = 4
# Slower than this times the best while searching cannot win the finals.
_FINAL_RATIO = 1.25

Told = Callable[["Contender"], None]


class Contender:
    """A kernel being tuned for a problem.

    Args:
        kernel: supports the problem.
        problem: what is computed.
        device: where.
        key: the problem's bucket.
        store: asked for the incumbent.
        seed: of the search.

    Attributes:
        space: the feasible configs.
        measurements: all that was tried, in order.
        times_ns: median while searching, of each config that passed.
        verdicts: of each config tried.
    """

    def __init__(
        self,
        kernel: Kernel,
        problem: AttentionProblem,
        device: DeviceKey,
        key: ProblemKey,
        store: Store,
        seed: int,
    ) -> None:
        self.kernel = kernel
        self.space = enumerate_space(kernel, problem)
        self.toolchain_class = toolchain_class(kernel.backend)
        self.source_sha256 = source_of_files(tuple(str(file) for file in kernel.source_files()))
        self.space_sha256 = space_sha256(self.space.values)
        self.measurements: list[Measurement] = []
        self.times_ns: dict[Config, int] = {}
        self.verdicts: dict[Config, Verdict] = {}
        stored = store.incumbent(device, key, kernel.name, self.toolchain_class, measure.POLICY)
        self.incumbent_rev = stored.rev if stored is not None else 0
        self.incumbent = self._feasible(stored.params) if stored is not None else None
        elsewhere = lookup.find(kernel.name, problem, device)
        known = [
            self.incumbent,
            self._feasible(elsewhere.params) if elsewhere is not None else None,
        ]
        self._search = Search(
            self.space.configs, [config for config in known if config is not None], seed
        )
        self._problem = problem

    @property
    def default(self) -> Config:
        """The kernel's default config."""
        return self.space.configs[0]

    @property
    def works(self) -> bool:
        """Whether the default ran and was right."""
        return self.default in self.times_ns

    def _feasible(self, params: dict[str, int | bool | str]) -> Config | None:
        with contextlib.suppress(ConfigError):
            config = self.kernel.config_from_dict(params)
            return config if config in self.space.configs else None
        return None  # a config of an older form of the kernel

    def run_of(self, verifier: Verifier, config: Config) -> measure.Run:
        """A call of this kernel with a config, for timing."""
        kernel, inputs = self.kernel, verifier.inputs
        return lambda: kernel.run(inputs, config)

    def search(
        self, verifier: Verifier, timer: measure.Timer, deadline: float, told: Told
    ) -> None:
        """Try configs until the deadline (on `time.monotonic`) or until none is left.

        The default is always tried.
        """
        while not self._search.exhausted:
            started = time.monotonic()
            config = self._search.ask()
            self._try(config, verifier, timer)
            self._search.tell(self.times_ns.get(config))
            told(self)
            now = time.monotonic()
            if not self.works or 2 * now - started > deadline:  # the next takes about as long
                break

    def _try(self, config: Config, verifier: Verifier, timer: measure.Timer) -> None:
        """Verify one config and, if it is right, time it."""
        verdict = verifier.check(self.kernel, config)
        timing = None
        if verdict.status == "ok":
            best = min(self.times_ns.values(), default=None)
            try:
                timing = measure.summarise(
                    measure.screen(timer, self.run_of(verifier, config), best_ns=best)
                )
            except Exception as error:  # as in Verifier.check: it ends the candidate only
                verdict = Verdict(
                    "launch_error", f"while timed: {type(error).__name__}: {str(error)[:1500]}"
                )
        if timing is not None:
            self.times_ns[config] = timing.median_ns
        else:
            _check_device(verifier, config)
        self.verdicts[config] = verdict
        self.measurements.append(
            Measurement(
                params=config.to_dict(),
                round=0,
                status=verdict.status,
                timing=timing,
                max_abs_err=verdict.max_abs_err,
                max_rel_err=verdict.max_rel_err,
                compile_ns=max(verdict.first_run_ns - timing.median_ns, 0)
                if timing is not None
                else None,
                error=verdict.reason,
            )
        )

    def finalists(self, left_ns: int) -> list[Config]:
        """The configs to time again: the default, the best few within reach, the incumbent.

        Args:
            left_ns: time for the finals; the default and one rival are taken whatever it is.
        """
        if not self.works:
            return []
        ranked = sorted(self.times_ns, key=self.times_ns.__getitem__)
        reach = _FINAL_RATIO * self.times_ns[ranked[0]]
        rivals = [config for config in ranked[:FINALISTS] if self.times_ns[config] <= reach]
        if self.incumbent is not None and self.incumbent in self.times_ns:
            rivals.insert(1, self.incumbent)
        chosen = [self.default]
        for config in dict.fromkeys(rivals):
            needed = measure.MIN_ROUNDS * sum(self.times_ns[one] for one in (*chosen, config))
            if config != self.default and (len(chosen) == 1 or needed <= left_ns):
                chosen.append(config)
        return chosen

    def winner(self, finalists: Sequence[Config], samples: Sequence[Sequence[int]]) -> int:
        """Which finalist wins: the fastest by paired samples, if it clearly beats the default.

        Within half a percent of the fastest the incumbent stays, so that tuning again changes
        nothing without need.
        """
        medians = [measure.summarise(one).median_ns for one in samples]
        faster = [
            index
            for index in range(1, len(finalists))
            if measure.is_faster(samples[index], samples[0])
        ]
        if not faster:
            return 0
        best = min(faster, key=lambda index: medians[index])
        close = [index for index in faster if medians[index] <= 1.005 * medians[best]]
        return next((index for index in close if finalists[index] == self.incumbent), best)


def _check_device(verifier: Verifier, config: Config) -> None:
    """Stop if a candidate left the device unusable: every later verdict would be wrong."""
    if not verifier.inputs.query.is_cuda:
        return
    try:
        torch.cuda.synchronize(verifier.inputs.query.device)
        torch.ones(1, device=verifier.inputs.query.device).add_(1)
        torch.cuda.synchronize(verifier.inputs.query.device)
    except RuntimeError as error:
        raise TuningError(
            f"the device is unusable after config {config}: {str(error)[:300]}. What was finished "
            "before this problem is "
            "stored; start `portattn tune` again"
        ) from error
