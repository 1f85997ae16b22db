"""The rule of q_offset."""

import pytest

from portattn import masks
from portattn.errors import MaskError
from portattn.masks import resolve_q_offset


def test_equal_lengths_start_at_zero():
    assert resolve_q_offset(masks.causal(), None, 7, 7) == 0
    assert resolve_q_offset(masks.causal(), "end", 7, 7) == 0


def test_choices():
    assert resolve_q_offset(masks.causal(), "end", 3, 10) == 7
    assert resolve_q_offset(masks.causal(), "end", 10, 3) == -7
    assert resolve_q_offset(masks.causal(), "start", 3, 10) == 0
    assert resolve_q_offset(masks.causal(), -4, 3, 10) == -4
    assert resolve_q_offset(None, 2, 3, 10) == 2


def test_where_positions_do_not_matter_none_is_zero():
    assert resolve_q_offset(None, None, 3, 10) == 0
    assert resolve_q_offset(masks.padding([2]), None, 3, 10) == 0


@pytest.mark.parametrize("mask", [masks.causal(), masks.QuerySet([1]), ~masks.SameBlock(4)])
def test_different_lengths_need_it_said(mask):
    with pytest.raises(
        MaskError, match=r'q_offset is None with seqlen_q 3 and seqlen_k 10.*"end".*"start"'
    ):
        resolve_q_offset(mask, None, 3, 10)
    with pytest.raises(MaskError, match="q_offset is None"):
        mask.to_dense(3, 10)


def test_alibi_depends_on_positions():
    with pytest.raises(MaskError, match="ALiBi"):
        resolve_q_offset(None, None, 3, 10, alibi=True)


@pytest.mark.parametrize("value", ["middle", 1.5, True, 2**62, [0]])
def test_other_values_are_named(value):
    with pytest.raises(MaskError, match="q_offset is"):
        resolve_q_offset(masks.causal(), value, 3, 10)
