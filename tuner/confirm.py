"""The last word on a winner: against the default once more, in a process that ran nothing else."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from portattn.tuner import measure
from portattn.tuner.executor import Entry

if TYPE_CHECKING:
    from portattn.backends.base import Config, Kernel
    from portattn.tuner.executor import Executor


@dataclasses.dataclass(frozen=True, slots=True)
class Confirmation:
    """A config beside the default, in another process.

    Attributes:
        best_ns, default_ns: medians; 0 if one of them failed.
        ratio: of the config's time to the default's; None if one of them failed.
        reason: why it failed; "" if it did not.
    """

    best_ns: int
    default_ns: int
    ratio: measure.Ratio | None
    reason: str = ""

    @property
    def is_faster(self) -> bool:
        """Whether the config is right there, and faster beyond the interval."""
        return self.ratio is not None and self.ratio.high < 1

    @property
    def is_slower(self) -> bool:
        """Whether the config is wrong there, or slower beyond the interval."""
        return self.ratio is None or self.ratio.low > 1

    @property
    def text(self) -> str:
        """For people."""
        if self.ratio is None:
            return self.reason
        one = self.ratio
        return f"{one.median:.3f} of the default's time, 95 %: {one.low:.3f} to {one.high:.3f}"


def confirm(
    kernel: Kernel, default: Config, best: Config, executor: Executor, seconds: float
) -> Confirmation:
    """Verify two configs and time them in turns.

    Args:
        kernel: whose.
        default, best: the configs.
        executor: at the case; it has run nothing but such comparisons.
        seconds: of rounds; `measure.MIN_ROUNDS` are done whatever it is.

    Raises:
        DeviceLostError: nothing can be measured any more.
    """
    entries = []
    for config in (default, best):
        attempt = executor.attempt(kernel, config, None)
        if attempt.verdict.status != "ok":
            reason = f"{attempt.verdict.status}: {attempt.verdict.reason}"
            return Confirmation(0, 0, None, reason)
        time_ns = measure.summarise(attempt.samples).median_ns
        entries.append(Entry(kernel, config, time_ns))
    defaults, bests = executor.rounds(entries, seconds, min_rounds=measure.MIN_ROUNDS)
    return Confirmation(
        measure.summarise(bests).median_ns,
        measure.summarise(defaults).median_ns,
        measure.ratio(bests, defaults),
    )
