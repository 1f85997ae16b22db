"""The random expressions reach every primitive, and are not all empty or full."""

import collections

from hypothesis import HealthCheck, given, settings

from portattn.masks.mask import Composite
from tests.strategies import mask_expressions


def _opcodes(mask):
    yield mask.opcode
    if isinstance(mask, Composite):
        for operand in mask.operands:
            yield from _opcodes(operand)


def test_expressions_have_every_opcode_and_are_rarely_trivial():
    seen, shares = collections.Counter(), []

    @settings(max_examples=400, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(mask_expressions())
    def collect(case):
        assert case.mask.depth <= 4
        seen.update(_opcodes(case.mask))
        dense = case.mask.to_dense(case.seqlen_q, case.seqlen_k, case.q_offset)
        shares.append(float(dense.double().mean()))

    collect()
    assert set(seen) == set(range(19))
    assert sum(0 < share < 1 for share in shares) > len(shares) / 3
