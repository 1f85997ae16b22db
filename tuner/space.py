"""The feasible configs of a kernel for a problem: its declared space, filtered."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING

from portattn.errors import TuningError
from portattn.tuning_db.identity import sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

    from portattn.backends.base import Config, ConfigValue, Kernel
    from portattn.problem import AttentionProblem

MAX_PRODUCT = 200_000
QUARANTINE = "it failed before on such a device: it is in quarantine"


class SpaceError(TuningError):
    """A kernel declares a space that cannot be searched: its bug, and it is left out."""


@dataclasses.dataclass(frozen=True, slots=True)
class Space:
    """What can be tried.

    Attributes:
        configs: feasible ones, distinct, the default first.
        declared: the product of the declared values.
        infeasible: reason -> how many configs have it as their first reason.
        values: the declared values per field.
    """

    configs: tuple[Config, ...]
    declared: int
    infeasible: Mapping[str, int]
    values: Mapping[str, Sequence[ConfigValue]]

    def without(self, params_sha256: Set[str]) -> Space:
        """The same space less configs with these hashes; the default stays."""
        if not params_sha256:
            return self
        kept = tuple(
            config
            for index, config in enumerate(self.configs)
            if not index or sha256(config.to_dict()) not in params_sha256
        )
        count = len(self.configs) - len(kept)
        infeasible = {**self.infeasible, QUARANTINE: count} if count else self.infeasible
        return dataclasses.replace(self, configs=kept, infeasible=infeasible)


def enumerate_space(kernel: Kernel, problem: AttentionProblem) -> Space:
    """Every feasible config of a kernel for a problem that it supports.

    Raises:
        SpaceError: the declared space is too large to enumerate, or the default is not feasible
            (a bug of the kernel).
    """
    values = kernel.search_space(problem)
    declared = math.prod(len(choices) for choices in values.values()) if values else 0
    if declared > MAX_PRODUCT:
        raise SpaceError(
            f"search space of {kernel.name} has {declared} configs; at most {MAX_PRODUCT} are "
            "enumerated. Declare "
            "fewer values in its search_space"
        )
    default = kernel.default_config(problem)
    reasons = kernel.infeasible_reasons(problem, default)
    if reasons:
        raise SpaceError(
            f"the default config of {kernel.name} is not feasible: {'; '.join(reasons)}"
        )
    configs: dict[Config, None] = {default: None}
    infeasible: dict[str, int] = {}
    for chosen in itertools.product(*values.values()) if values else ():
        config = kernel.config_from_dict(
            {**default.to_dict(), **dict(zip(values, chosen, strict=True))}
        )
        why = kernel.infeasible_reasons(problem, config)
        if why:
            infeasible[why[0]] = infeasible.get(why[0], 0) + 1
        else:
            configs[config] = None
    return Space(tuple(configs), declared, infeasible, values)
