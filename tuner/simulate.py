"""Searches compared on recorded times: how near to the optimum after how many evaluations."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING

from portattn.tuner.grid import Grid
from portattn.tuner.replay import kernel_of
from portattn.tuner.search import Search

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.tuner.oracle import Table

# The tuner times its best few again, in turns: of these the truly best one wins.
_FINALISTS = 8


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
    table: Table,
    strategy: str,
    seed: int,
    evaluations: int,
    *,
    noise: float = 0.01,
    grid: Grid | None = None,
) -> Course:
    """Search a table.

    Args:
        table: recorded times.
        strategy: one of `search.STRATEGIES`.
        seed: of the search and the noise.
        evaluations: at most.
        noise: standard deviation of a screening's median, relative.
        grid: of the table's configs, for several runs; made if None.
    """
    grid = Grid(kernel_of(table).configs()) if grid is None else grid
    search = Search(grid, [], seed, strategy)
    noises = random.Random(seed)
    told: list[tuple[float, int]] = []  # (seen, true) ns
    fractions: list[float] = []
    optimum_ns = table.optimum_ns
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
        fractions.append(optimum_ns / best if best else 0.0)
    return Course(strategy, seed, table, tuple(fractions))


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """A strategy over all tables and seeds.

    Attributes:
        strategy: its name.
        evaluations: after how many.
        median, low, worst: fraction of the optimum: the median, the 5th percentile and the worst.
        within_1, within_3: share of the runs within 1 % and 3 % of the optimum.
    """

    strategy: str
    evaluations: int
    median: float
    low: float
    worst: float
    within_1: float
    within_3: float


def courses(
    tables: Sequence[Table],
    strategy: str,
    evaluations: int,
    *,
    seeds: int = 20,
    noise: float = 0.01,
) -> list[Course]:
    """Run a strategy on every table with every seed.

    Args:
        tables, strategy, evaluations, noise: see `run`.
        seeds: how many.
    """
    found = []
    for table in tables:
        grid = Grid(kernel_of(table).configs())
        found += [
            run(table, strategy, seed, evaluations, noise=noise, grid=grid)
            for seed in range(seeds)
        ]
    return found


def summarise(found: Sequence[Course], evaluations: int) -> Summary:
    """A strategy's courses after so many evaluations."""
    fractions = sorted(course.after(evaluations) for course in found)
    last = len(fractions) - 1

    def within(share: float) -> float:
        return sum(fraction >= 1 / (1 + share) for fraction in fractions) / len(fractions)

    return Summary(
        found[0].strategy,
        evaluations,
        fractions[last // 2],
        fractions[last // 20],
        fractions[0],
        within(0.01),
        within(0.03),
    )
