"""Searches compared on recorded times: how near to the optimum after how many evaluations."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING

from portattn.tuner import oracle
from portattn.tuner.search import Search

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.tuner.oracle import Table

# The tuner times its best few again, in turns: of these the truly best one wins.
_FINALISTS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Course:
    """One search on one table.

    Attributes:
        strategy, seed: of the search.
        table: what was searched.
        fractions: optimum / time of the config that the finals would take, after each evaluation.
    """

    strategy: str
    seed: int
    table: Table
    fractions: tuple[float, ...]

    def after(self, evaluations: int) -> float:
        """The fraction after this many evaluations, or after all that there were."""
        return self.fractions[min(evaluations, len(self.fractions)) - 1]


def run(
    table: Table, strategy: str, seed: int, evaluations: int, *, noise: float = 0.01
) -> Course:
    """Search a table.

    Args:
        table: recorded times.
        strategy: one of `search.STRATEGIES`.
        seed: of the search and the noise.
        evaluations: at most.
        noise: standard deviation of a screening's median, relative.
    """
    kernel = oracle.kernel_of(table)
    search = Search(kernel.configs(), [], seed, strategy)
    noises = random.Random(seed)
    told: list[tuple[float, int]] = []  # (seen, true) ns
    fractions: list[float] = []
    while len(fractions) < evaluations and not search.exhausted:
        proposal = search.ask()
        outcome = table.outcome(proposal.config)
        if isinstance(outcome, str):
            search.tell(proposal, None)
        else:
            seen = outcome * (1 + noise * noises.gauss())
            told = sorted([*told, (seen, outcome)])[:_FINALISTS]
            search.tell(proposal, int(seen))
        best = min((true for _, true in told), default=0)
        fractions.append(table.optimum_ns / best if best else 0.0)
    return Course(strategy, seed, table, tuple(fractions))


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """A strategy over all tables and seeds.

    Attributes:
        strategy: its name.
        evaluations: after how many.
        median, low, worst: fraction of the optimum: the median, the 5th percentile and the worst.
        within: share of the runs within 1 % of the optimum.
    """

    strategy: str
    evaluations: int
    median: float
    low: float
    worst: float
    within: float


def compare(
    tables: Sequence[Table],
    strategies: Sequence[str],
    evaluations: Sequence[int],
    *,
    seeds: int = 20,
    noise: float = 0.01,
) -> list[Summary]:
    """Run every strategy on every table with every seed.

    Args:
        tables, strategies: what.
        evaluations: where to look.
        seeds: how many.
        noise: see `run`.
    """
    summaries = []
    for strategy in strategies:
        courses = [
            run(table, strategy, seed, max(evaluations), noise=noise)
            for table in tables
            for seed in range(seeds)
        ]
        for count in evaluations:
            found = sorted(course.after(count) for course in courses)
            last = len(found) - 1
            within = sum(fraction >= 1 / 1.01 for fraction in found) / len(found)
            summaries.append(
                Summary(strategy, count, found[last // 2], found[last // 20], found[0], within)
            )
    return summaries
