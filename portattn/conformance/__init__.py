"""One suite for every kernel: named cases, compared with the reference in float64.

``portattn verify`` prints it; the tests of a backend bind it with `suite.check`.
"""

from portattn.conformance.cases import CASES, Case
from portattn.conformance.gradients import check_gradients, gradient_outcome
from portattn.conformance.suite import DTYPES, Outcome, check, kernels, outcome

__all__ = [
    "CASES",
    "DTYPES",
    "Case",
    "Outcome",
    "check",
    "check_gradients",
    "gradient_outcome",
    "kernels",
    "outcome",
]
