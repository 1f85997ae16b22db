"""One kernel on one problem: its space, its search, and what it sends to the finals."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING

from portattn.errors import ConfigError
from portattn.tuner import measure
from portattn.tuner.executor import Attempt
from portattn.tuner.search import Search
from portattn.tuner.space import enumerate_space
from portattn.tuner.verify import Verdict
from portattn.tuner.work import shape_of
from portattn.tuning_db import quarantine
from portattn.tuning_db.identity import (
    source_of_files,
    space_sha256,
    toolchain_class,
)
from portattn.tuning_db.records import Measurement, Subject

if TYPE_CHECKING:
    from portattn.backends.base import Config, Kernel
    from portattn.device import DeviceKey
    from portattn.tuner.cases import Case
    from portattn.tuner.executor import Executor
    from portattn.tuner.pool import Compilation, CompilePool
    from portattn.tuner.portfolio import Portfolio
    from portattn.tuner.search import Proposal
    from portattn.tuning_db.key import ProblemKey
    from portattn.tuning_db.store import Store

FINALISTS = 8
# Each takes long: a kernel with so many is tried no further on a problem.
_MOST_HANGS = 3
# Slower than this times the best while searching cannot win the finals.
_FINAL_RATIO = 1.25
# Compiled configs that wait to be measured: with more, the search would ask without knowing.
_MOST_READY = 4
# Whatever else a config with such a verdict is, it is not worth another try on this device.
_QUARANTINED = frozenset(
    {"compile_timeout", "run_timeout", "crash", "launch_error", "wrong_result", "nan", "oob"}
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Pending:
    """Asked for, not judged yet; without a pool there is no compilation."""

    proposal: Proposal
    compilation: Compilation | None

    @property
    def is_ready(self) -> bool:
        return self.compilation is None or self.compilation.ready.is_set()


class Contender:
    """A kernel being tuned for a problem.

    Args:
        kernel: supports the problem.
        case: what is computed.
        device: where.
        key: the problem's bucket.
        store: holds the incumbent, configs in quarantine, and what the run has measured.
        portfolio: configs to try early.
        run_id: the run in the store.
        policy: how times are taken.
        seed: of the search.

    Attributes:
        space: the feasible configs.
        measurements: all that was tried, in order.
        times_ns: median while searching, of each config that passed.
        verdicts: of each config tried.
        incumbent: the stored best config, if it is still feasible.
        known: configs that are tried right after the default.
        duplicates: configs left out because they do the same as another on the device.
        spent_s: time taken for judging.
    """

    def __init__(
        self,
        kernel: Kernel,
        case: Case,
        device: DeviceKey,
        key: ProblemKey,
        store: Store,
        portfolio: Portfolio,
        *,
        run_id: str,
        policy: str,
        seed: int,
    ) -> None:
        self.kernel, self._case = kernel, case
        self._store, self._run_id = store, run_id
        self.toolchain_class = toolchain_class(kernel.backend)
        self.source_sha256 = source_of_files(tuple(str(file) for file in kernel.source_files()))
        space = enumerate_space(kernel, case.problem)
        self.space_sha256 = space_sha256(space.values)
        self.space = space.without(
            quarantine.params_in(store, kernel.name, self.source_sha256, device.family)
        )
        self.measurements: list[Measurement] = []
        self.times_ns: dict[Config, int] = {}
        self.verdicts: dict[Config, Verdict] = {}
        self.duplicates = 0
        self.spent_s = 0.0
        stored = store.incumbent(device, key, kernel.name, self.toolchain_class, policy)
        self.incumbent_rev = stored.rev if stored is not None else 0
        self.incumbent = self._feasible(stored.params) if stored is not None else None
        near = [self._feasible(params) for params in portfolio.near(kernel.name, key)]
        self.known = [config for config in (self.incumbent, *near) if config is not None]
        self._search = Search(self.space.configs, self.known, seed)
        self._pending: list[_Pending] = []
        self._asked = 0
        self._codes: dict[str, Config] = {}
        identity = (kernel.name, kernel.backend, self.source_sha256, self.space_sha256)
        self._subject = Subject(device, key, shape_of(case), policy, *identity)
        for one in store.measured(run_id, self._subject):
            self._replay(one)

    @property
    def default(self) -> Config:
        """The kernel's default config."""
        return self.space.configs[0]

    @property
    def works(self) -> bool:
        """Whether the default ran and was right."""
        return self.default in self.times_ns

    def failed(self) -> list[Measurement]:
        """Configs tried here that must not be tried again, on any problem."""
        return [one for one in self.measurements if one.status in _QUARANTINED]

    def _feasible(self, params: dict[str, int | bool | str]) -> Config | None:
        with contextlib.suppress(ConfigError):
            config = self.kernel.config_from_dict(params)
            return config if config in self.space.configs else None
        return None  # a config of an older form of the kernel

    def _replay(self, measured: Measurement) -> None:
        """Take over what this run measured before it was interrupted."""
        config = self._feasible(measured.params)
        if config is None:
            return  # in quarantine since
        self._asked += 1
        errors = measured.max_abs_err, measured.max_rel_err
        self.verdicts[config] = Verdict(measured.status, measured.error, *errors)
        self.measurements.append(measured)
        if measured.timing is not None:
            self.times_ns[config] = measured.timing.median_ns
        self._search.replay(config, self.times_ns.get(config))

    def prefetch(self, pool: CompilePool, priority: int, count: int) -> None:
        """Have the first configs compiled while others are measured."""
        while self._asked < count and not self._search.exhausted:
            self._propose(pool, priority)

    def _propose(self, pool: CompilePool | None, priority: int) -> None:
        proposal = self._search.ask()
        self._asked += 1
        compilation = None
        if pool is not None:
            compilation = pool.submit(self._case, self.kernel, proposal.config, priority)
        self._pending.append(_Pending(proposal, compilation))

    def fill(
        self, pool: CompilePool | None, priority: int, most: int | None, sharers: int
    ) -> None:
        """Ask for more: keep the compilers busy, but ask no further ahead than that takes.

        Args:
            pool: compiles configs ahead; without, running one compiles it.
            priority: of this problem in the pool.
            most: bound on configs; None for no bound.
            sharers: contenders that feed the pool at the same time.
        """
        hangs = sum(verdict.status == "run_timeout" for verdict in self.verdicts.values())
        if (self.verdicts and not self.works) or hangs >= _MOST_HANGS:
            return
        while not self._search.exhausted and (most is None or self._asked < most):
            ready = sum(one.is_ready for one in self._pending)
            running = len(self._pending) - ready
            if pool is None:
                if self._pending:
                    break
            elif ready >= _MOST_READY or running > pool.count // sharers:
                break
            self._propose(pool, priority)

    @property
    def is_open(self) -> bool:
        """Whether something was asked for that is not judged yet."""
        return bool(self._pending)

    @property
    def is_ready(self) -> bool:
        """Whether `step` has something to judge."""
        return self._ready() is not None

    def step(self, executor: Executor) -> None:
        """Judge the first config that is ready.

        Args:
            executor: at this contender's case.
        """
        index = self._ready()
        assert index is not None, "is_ready comes first"
        started = time.monotonic()
        self._judge(self._pending.pop(index), executor)
        self.spent_s += time.monotonic() - started
        if not self.works:
            self.drop()

    def drop(self) -> None:
        """Forget what was asked for and is not judged."""
        for left in self._pending:
            if left.compilation is not None:
                left.compilation.cancelled = True
        self._pending.clear()

    def _ready(self) -> int | None:
        # Nothing is measured before the default: all else is compared with it.
        among = self._pending if self.verdicts else self._pending[:1]
        return next((index for index, one in enumerate(among) if one.is_ready), None)

    def _judge(self, pending: _Pending, executor: Executor) -> None:
        """Verify one config and, if it is right, time it."""
        config, compiled = pending.proposal.config, pending.compilation
        if compiled is not None and compiled.status == "ok":
            same = self._codes.setdefault(compiled.code, config)
            if same != config:
                self.duplicates += 1
                self._search.tell(pending.proposal, self.times_ns.get(same))
                return
        if compiled is not None and compiled.status != "ok":
            attempt = Attempt(Verdict(compiled.status, compiled.reason))
        else:
            best = min(self.times_ns.values(), default=None)
            attempt = executor.attempt(self.kernel, config, best)
        self._note(config, attempt, compiled)
        self._search.tell(pending.proposal, self.times_ns.get(config))

    def _note(self, config: Config, attempt: Attempt, compiled: Compilation | None) -> None:
        verdict = attempt.verdict
        timing = measure.summarise(attempt.samples) if attempt.samples else None
        compile_ns = compiled.compile_ns if compiled is not None else None
        if timing is not None:
            self.times_ns[config] = timing.median_ns
            if compile_ns is None:
                compile_ns = max(verdict.first_run_ns - timing.median_ns, 0)
        measured = Measurement(
            params=config.to_dict(),
            round=0,
            status=verdict.status,
            timing=timing,
            max_abs_err=verdict.max_abs_err,
            max_rel_err=verdict.max_rel_err,
            compile_ns=compile_ns if timing is not None else None,
            error=verdict.reason,
        )
        self._store.add(self._run_id, self._subject, measured)
        self.verdicts[config] = verdict
        self.measurements.append(measured)

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
