"""A feasible set as numbers: what samplers and models work on. Several searches may share one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from portattn.tuner.model import Floats, coordinates, distances

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.backends.base import Config

Point = dict[str, int]


class Grid:
    """An enumerated set of configs.

    Every field is the index of a value among its sorted values, so that samplers see numbers in
    order.

    Args:
        configs: feasible, distinct, the default first.

    Attributes:
        configs: the same.
        points: field -> index, of each config.
        table: the same, int64 [configs, fields].
        index: of a point's values in `configs`.
        distributions: of each field's index.
    """

    def __init__(self, configs: Sequence[Config]) -> None:
        self.configs = configs
        fields = [config.to_dict() for config in configs]
        orders = {
            name: sorted(
                {values[name] for values in fields}, key=lambda value: (str(type(value)), value)
            )
            for name in fields[0]
        }
        places = {
            name: {value: place for place, value in enumerate(order)}
            for name, order in orders.items()
        }
        self.points: list[Point] = [
            {name: places[name][value] for name, value in values.items()} for values in fields
        ]
        keys = [tuple(point.values()) for point in self.points]
        self.index = {key: number for number, key in enumerate(keys)}
        self.table = np.array(keys, dtype=np.int64)
        self.distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(order) - 1)
            if type(order[0]) is int
            else CategoricalDistribution(range(len(order)))
            for name, order in orders.items()
        }
        ordered = [isinstance(one, IntDistribution) for one in self.distributions.values()]
        self._coordinates = coordinates(keys, ordered)
        self._rows: dict[int, Floats] = {}

    def index_of(self, config: Config) -> int:
        """Where a config stands.

        Raises:
            ValueError: it is not among them.
        """
        return self.configs.index(config)

    def distances_from(self, indices: Sequence[int]) -> Floats:
        """Of some configs to all: [indices, configs]."""
        for index in indices:
            if index not in self._rows:
                self._rows[index] = distances(self._coordinates[[index]], self._coordinates)[0]
        return np.stack([self._rows[index] for index in indices])
