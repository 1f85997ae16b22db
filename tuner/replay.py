"""Recorded times as a kernel and a device that everybody has.

`RecordedKernel` and `ReplayExecutor` stand for kernel and device in `portattn.tuner.tune`, so that
the same driver runs without the device, with noise and faults as wanted.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, ClassVar

from portattn.backends.base import AttentionInputs, Config, ConfigValue, Kernel
from portattn.errors import TuningError
from portattn.tuner.executor import Attempt, Entry, Executor
from portattn.tuner.verify import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from portattn.problem import AttentionProblem
    from portattn.tuner.cases import Case
    from portattn.tuner.oracle import Table


class RecordedKernel(Kernel):
    """A kernel whose space is what was recorded; it runs on a `ReplayExecutor` only."""

    table: ClassVar[Table]

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """See `Kernel`."""
        return []

    def default_config(self, problem: AttentionProblem) -> Config:
        """See `Kernel`."""
        return self.config_of(self.table.default)

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """See `Kernel`."""
        columns = zip(*self.table.outcomes, strict=True)
        return {
            name: sorted(set(values), key=lambda value: (str(type(value)), value))
            for name, values in zip(self.table.fields, columns, strict=True)
        }

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """See `Kernel`."""
        values = tuple(config.to_dict()[name] for name in self.table.fields)
        return [] if values in self.table.outcomes else ["it was not recorded"]

    def source_files(self) -> Sequence[str]:
        """See `Kernel`."""
        return []

    def run(self, inputs: AttentionInputs, config: Config) -> None:
        """See `Kernel`."""
        raise TuningError(f"{self.name} is recorded; it runs on a ReplayExecutor only")

    def config_of(self, values: Sequence[ConfigValue]) -> Config:
        """A config from its values in the table's order."""
        return self.config_type(**dict(zip(self.table.fields, values, strict=True)))

    def configs(self) -> list[Config]:
        """All configs, the default first."""
        others = [values for values in self.table.outcomes if values != self.table.default]
        return [self.config_of(values) for values in (self.table.default, *others)]


def kernel_of(table: Table) -> RecordedKernel:
    """The kernel of a table."""
    fields = [
        (name, type(value), dataclasses.field(default=value))
        for name, value in zip(table.fields, table.default, strict=True)
    ]
    config = dataclasses.make_dataclass("RecordedConfig", fields, bases=(Config,), frozen=True)
    members = {"name": table.kernel, "backend": table.backend, "config_type": config}
    made: RecordedKernel = type("Recorded", (RecordedKernel,), {**members, "table": table})()
    return made


def no_fault(config: Config) -> str:
    """Nothing goes wrong that was not recorded."""
    return ""


class ReplayExecutor(Executor):
    """Plays recorded outcomes, with noise and faults.

    Args:
        tables: one per kernel, by the kernel's name.
        noise: standard deviation of a sample, relative.
        seed: of the noise.
        fault: says with which status a config fails; "" for as recorded.
    """

    policy = "replay"

    def __init__(
        self,
        tables: Sequence[Table],
        *,
        noise: float = 0.0,
        seed: int = 0,
        fault: Callable[[Config], str] = no_fault,
    ) -> None:
        self._tables = {table.kernel: table for table in tables}
        self._noise, self._random, self._fault = noise, random.Random(seed), fault
        self.attempts: list[tuple[str, Config]] = []

    def begin(self, case: Case) -> None:
        """See `Executor`."""

    def attempt(self, kernel: Kernel, config: Config, best_ns: int | None) -> Attempt:
        """See `Executor`."""
        self.attempts.append((kernel.name, config))
        outcome = self._fault(config) or self._tables[kernel.name].outcome(config)
        if isinstance(outcome, str):
            return Attempt(Verdict(outcome, "so it was recorded or asked for"))
        return Attempt(Verdict("ok"), tuple(self._sample(outcome) for _ in range(5)))

    def rounds(
        self, entries: Sequence[Entry], seconds: float, *, min_rounds: int
    ) -> list[list[int]]:
        """See `Executor`."""
        times = [self._tables[one.kernel.name].outcome(one.config) for one in entries]
        return [
            [self._sample(time_ns) for _ in range(max(min_rounds, 21))]
            for time_ns in times
            if isinstance(time_ns, int)
        ]

    def close(self) -> None:
        """See `Executor`."""

    def _sample(self, time_ns: int) -> int:
        """Noise is never negative beyond a bound: runs are late, not early."""
        factor = 1 + self._noise * max(self._random.gauss(), -2)
        return max(int(time_ns * factor), 1)
