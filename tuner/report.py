"""What `portattn.tuner.tune` says while it works and when it is done.

Plain data; the command line draws it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portattn.tuning_db.records import Params


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """Where the tuning stands.

    Attributes:
        problem, problems: which problem (from 0) of how many.
        label: the problem.
        stage: ``"verify"``, ``"search"``, ``"finals"``, ``"confirm"`` or ``"stored"``.
        kernel: being tuned; "" in other stages.
        tried, feasible: configs of that kernel.
        best_ns, default_ns: of that kernel so far; None before the first time.
        elapsed_s, budget_s: seconds.
    """

    problem: int
    problems: int
    label: str
    stage: str
    kernel: str
    tried: int
    feasible: int
    best_ns: int | None
    default_ns: int | None
    elapsed_s: float
    budget_s: float


ProgressCallback = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True, slots=True)
class KernelReport:
    """One kernel on one problem.

    Attributes:
        name: the kernel.
        feasible, declared, tried: how many configs could run, were declared, were tried.
        infeasible: reason -> count, for configs ruled out before running.
        rejected: (config, status, reason) of each config that ran wrongly or not at all.
        params: the best config; None if not even the default works.
        default_ns, best_ns: medians of the interleaved finals.
        kept_default: no other config was faster beyond noise.
        unconfirmed: a winner that was not faster in a fresh process, and what it did there.
    """

    name: str
    feasible: int
    declared: int
    tried: int
    infeasible: Mapping[str, int]
    rejected: tuple[tuple[Params, str, str], ...]
    params: Params | None
    default_ns: int
    best_ns: int
    kept_default: bool
    unconfirmed: str = ""

    @property
    def gain(self) -> float:
        """How many times faster than the default; 1 if it stayed, 0 if nothing works."""
        return self.default_ns / self.best_ns if self.best_ns else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class ProblemReport:
    """One problem.

    Attributes:
        label: its bucket.
        kernels: what was tuned, fastest first.
        refused: kernel -> why it cannot run this problem.
        seconds: spent on it.
    """

    label: str
    kernels: tuple[KernelReport, ...]
    refused: Mapping[str, tuple[str, ...]]
    seconds: float

    @property
    def fastest(self) -> str | None:
        """The kernel that is fastest when tuned; None if none works."""
        works = [report for report in self.kernels if report.params is not None]
        return min(works, key=lambda report: report.best_ns).name if works else None


@dataclasses.dataclass(frozen=True, slots=True)
class TuningReport:
    """One run.

    Attributes:
        device: its name.
        database: where the results lie.
        problems: those tuned.
        left_out: labels of problems that the budget did not reach.
        resumed: labels of problems that were done before the run was interrupted.
        seconds: the whole run.
    """

    device: str
    database: str
    problems: tuple[ProblemReport, ...]
    left_out: tuple[str, ...]
    seconds: float
    resumed: tuple[str, ...] = ()
