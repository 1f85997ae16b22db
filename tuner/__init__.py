"""Finds the best config of each kernel for a problem on this machine, by measuring, and stores it.

`tune` is the whole of it; ``cases`` says what to tune, ``space`` what can be tried, ``search`` in
which order, ``verify`` and ``measure`` how a candidate is judged, ``contender`` and ``tune`` put
them together.
"""

from portattn.tuner.cases import Case
from portattn.tuner.report import KernelReport, ProblemReport, Progress, TuningReport
from portattn.tuner.tune import tune

__all__ = ["Case", "KernelReport", "ProblemReport", "Progress", "TuningReport", "tune"]
