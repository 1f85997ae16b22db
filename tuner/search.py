"""Which config to try next.

Optuna keeps the study; the sampler draws only from feasible configs not yet tried.

Order: the default; configs known from elsewhere; stratified random ones; then, by turns,
what a model of the whole set promises most of (`portattn.tuner.model`), neighbours of the best
three, and random again (a quarter of all: on some spaces no model beats it). A small space is
tried whole. No config is proposed twice, none that is infeasible.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import TrialState

from portattn.tuner.grid import Grid
from portattn.tuner.model import most_promising

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

    from portattn.backends.base import Config

# "portattn" is the order above; the others are for comparison (`portattn bench-search`): a uniform
# choice, and Optuna's TPE alone after as many random ones.
STRATEGIES = ("portattn", "random", "tpe")
RANDOM_START = 10
_TOP = 3
_MODEL_NEEDS = 5  # times, before a model says more than chance


class FeasibleSampler(BaseSampler):
    """Samples from an enumerated set without repetition.

    Args:
        grid: the feasible set; its config 0 and then `first` are proposed before all others.
        first: indices of configs to propose early.
        seed: of every random choice.
        strategy: one of `STRATEGIES`.
    """

    def __init__(self, grid: Grid, first: Sequence[int], seed: int, strategy: str) -> None:
        self._strategy = strategy
        self._grid, self._points = grid, grid.points
        self._queue = list(dict.fromkeys([0, *first]))
        self._free = np.ones(len(grid.points), dtype=np.bool_)
        self._random = random.Random(seed)
        self._tpe = TPESampler(seed=seed, n_startup_trials=RANDOM_START)
        self._seen: dict[tuple[str, int], int] = {}
        self._asked = 0

    @property
    def exhausted(self) -> bool:
        """Whether every point has been proposed."""
        return not self._free.any()

    def take(self, index: int) -> None:
        """Never propose a point again."""
        self._free[index] = False

    def note(self, index: int) -> None:
        """A point is tried: it is not proposed again, and counts in what comes next."""
        self.take(index)
        self._asked += 1
        for item in self._points[index].items():
            self._seen[item] = self._seen.get(item, 0) + 1

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters, always: a point is proposed as a whole."""
        return self._grid.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point, marked as proposed."""
        index = self._next(study, trial)
        self.note(index)
        return dict(self._points[index])

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> int:
        """Never reached: every parameter is in the relative space."""
        raise AssertionError(f"parameter {param_name} is not in the search space")

    def _next(self, study: Study, trial: FrozenTrial) -> int:
        while self._queue:
            index = self._queue.pop(0)
            if self._free[index]:
                return index
        if self._strategy == "random":
            return self._random.choice(self._untried())
        if self._asked < RANDOM_START:
            return self._stratified()
        if self._strategy == "tpe":
            return self._by_tpe(study, trial)
        turn = self._asked % 4
        if turn == 0:
            return self._stratified()
        return self._neighbour(study) if turn == 2 else self._modelled(study)

    def _stratified(self) -> int:
        """A random point among those whose values were proposed least."""
        untried = self._untried()
        drawn = self._random.sample(untried, min(32, len(untried)))
        return min(
            drawn,
            key=lambda index: sum(self._seen.get(item, 0) for item in self._points[index].items()),
        )

    def _modelled(self, study: Study) -> int:
        """The untried point of which the model expects most."""
        times: dict[int, float | None] = {}
        for one in study.get_trials(deepcopy=False):
            # The trial that is being made has no parameters yet.
            if len(one.params) == len(self._grid.distributions):
                index = self._grid.index[
                    tuple(one.params[name] for name in self._grid.distributions)
                ]
                times[index] = one.value if one.state != TrialState.RUNNING else math.nan
        passed = sorted(time for time in times.values() if time and time == time)
        if len(passed) < _MODEL_NEEDS:
            return self._stratified()
        # Nobody wants what failed; what is under way is as good as the middle, so that nothing is
        # asked for right beside it.
        filled = [
            passed[-1] if time is None else time if time == time else passed[len(passed) // 2]
            for time in times.values()
        ]
        tried = list(times)
        rows = self._grid.distances_from(tried)
        untried = self._untried()
        return untried[most_promising(rows[:, tried], filled, rows[:, untried])]

    def _by_tpe(self, study: Study, trial: FrozenTrial) -> int:
        """The untried point nearest to what TPE proposes."""
        wanted = {
            name: self._tpe.sample_independent(study, trial, name, distribution)
            for name, distribution in self._grid.distributions.items()
        }
        return self._nearest([wanted[name] for name in self._points[0]])

    def _neighbour(self, study: Study) -> int:
        """An untried point as near as can be to one of the best three."""
        complete = [
            t
            for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if t.value is not None
        ]
        best = sorted(complete, key=lambda t: t.value or 0.0)[:_TOP]
        if not best:
            return self._stratified()
        centre = self._random.choice(best).params
        return self._nearest([centre[name] for name in self._points[0]])

    def _untried(self) -> list[int]:
        untried: list[int] = np.flatnonzero(self._free).tolist()
        return untried

    def _nearest(self, values: Sequence[int]) -> int:
        """The untried point that differs in the fewest fields, then by the fewest steps.

        The random generator breaks ties.
        """
        untried = np.flatnonzero(self._free)
        steps = np.abs(self._grid.table[untried] - np.array(values))
        apart = (steps > 0).sum(axis=1) * 1000 + steps.sum(axis=1)
        ties: list[int] = untried[apart == apart.min()].tolist()
        return self._random.choice(ties)


@dataclasses.dataclass(frozen=True, slots=True)
class Proposal:
    """One config that the search asks for, until its outcome is told."""

    config: Config
    trial: Trial


class Search:
    """The course of one search over a kernel's feasible configs. In memory; one thread.

    Args:
        configs: feasible, the default first; a grid of them may serve several searches.
        known: configs that did well elsewhere, tried right after the default; others are ignored.
        seed: same seed and same times, same course.
        strategy: one of `STRATEGIES`.
    """

    def __init__(
        self,
        configs: Sequence[Config] | Grid,
        known: Sequence[Config],
        seed: int,
        strategy: str = STRATEGIES[0],
    ) -> None:
        self._grid = configs if isinstance(configs, Grid) else Grid(configs)
        present = self._grid.configs
        first = [present.index(config) for config in known if config in present]
        self._sampler = FeasibleSampler(self._grid, first, seed, strategy)
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # creating a study logs a line
        self._study = optuna.create_study(direction="minimize", sampler=self._sampler)
        optuna.logging.set_verbosity(level)

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to ask for."""
        return self._sampler.exhausted

    def ask(self) -> Proposal:
        """The next config to try. Several may be asked for before the first is told."""
        trial = self._study.ask(self._sampler.infer_relative_search_space(self._study, None))  # type: ignore[arg-type]
        index = self._grid.index[tuple(trial.params[name] for name in self._grid.distributions)]
        self._sampler.take(index)  # Optuna itself fills in parameters that have one value
        return Proposal(self._grid.configs[index], trial)

    def replay(self, config: Config, median_ns: int | None) -> None:
        """A feasible config that was tried before this search began, and its outcome."""
        index = self._grid.index_of(config)
        self._sampler.note(index)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED if median_ns is None else TrialState.COMPLETE,
                params=dict(self._grid.points[index]),
                distributions=self._grid.distributions,
                value=None if median_ns is None else float(median_ns),
            )
        )

    def tell(self, proposal: Proposal, median_ns: int | None) -> None:
        """The outcome of a config asked for: its time, or None if it was rejected."""
        if median_ns is None:
            # TPE counts it among the bad ones.
            self._study.tell(proposal.trial, state=TrialState.PRUNED)
        else:
            self._study.tell(proposal.trial, float(median_ns))
