"""One suite for every kernel: named cases, compared with the reference in float64.

``portattn verify`` prints it; the tests of a backend bind it with `suite.check`.
"""

from portattn.conformance.cases import CASES, Case
from portattn.conformance.suite import DTYPES, Outcome, check, kernels, outcome

__all__ = ["CASES", "DTYPES", "Case", "Outcome", "check", "kernels", "outcome"]
