"""Masks reduced to four numbers keep what their predicates keep."""

import numpy as np
import pytest

from portattn import masks
from portattn.backends.scalar_mask import UNBOUNDED, ScalarMask, scalar_mask, streaming_mask

REDUCIBLE = {
    "causal": masks.causal(),
    "local": masks.local(5, 2),
    "sliding_window": masks.sliding_window(7),
    "key_range": masks.KeyRange(3, 11),
    "ahead": masks.Band(2, None),
    "open_range": masks.KeyRange(4, None),
    "all_of_them": masks.Band(-9, 4) & (masks.causal() & masks.KeyRange(2, 15)),
    "nothing": masks.Band(-9, -4) & masks.Band(-3, 0),
    "no_keys": masks.KeyRange(0, 5) & masks.KeyRange(8, 9),
}
OTHERS = {
    "union": masks.causal() | masks.KeyRange(0, 2),
    "complement": ~masks.causal(),
    "streaming": masks.streaming_llm(2, 4),
    "queries": masks.QueryRange(0, 4),
    "strided": masks.causal() & masks.DiffModulo(3, 0, 1),
    "by_head": masks.per_head([masks.causal(), masks.local(2, 2)]),
    "documents": masks.documents([0, 4, 9]) & masks.causal(),
}


def kept(scalars, seqlen_q, seqlen_k, q_offset):
    """Bool [seqlen_q, seqlen_k] by the equation of ScalarMask."""
    i = q_offset + np.arange(seqlen_q)[:, None]
    j = np.arange(seqlen_k)[None, :]
    begin = np.maximum(scalars.key_begin, i + scalars.lo)
    end = np.minimum(scalars.key_end, i + scalars.hi + 1)
    return (begin <= j) & (j < end)


@pytest.mark.parametrize("q_offset", [0, 6, -4])
@pytest.mark.parametrize("name", REDUCIBLE)
def test_reduced_masks_keep_the_same_pairs(name, q_offset):
    mask = REDUCIBLE[name]
    scalars = scalar_mask(mask.program)
    assert scalars is not None
    expected = mask.to_dense(9, 17, q_offset=q_offset).numpy()
    assert (kept(scalars, 9, 17, q_offset) == expected).all()


def test_no_mask_keeps_everything():
    assert scalar_mask(()) == ScalarMask(-UNBOUNDED, UNBOUNDED, 0, UNBOUNDED)


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_not_reduced(name):
    assert scalar_mask(OTHERS[name].program) is None


def test_bounds_saturate():
    scalars = scalar_mask((masks.Band(-(2**50), 2**50) & masks.KeyRange(0, 2**50)).program)
    assert scalars == ScalarMask()
    assert scalar_mask(masks.Band(2**50, None).program).lo == UNBOUNDED


STREAMING = {
    "streaming": masks.streaming_llm(3, 5),
    "bounded": masks.streaming_llm(3, 5) & masks.causal() & masks.KeyRange(None, 14),
    "no_end": masks.KeyRange(0, 4) | masks.Band(-2, None),
    "window": masks.sliding_window(7),
}


@pytest.mark.parametrize("q_offset", [0, 6, -4])
@pytest.mark.parametrize("name", STREAMING)
def test_first_keys_are_kept_beside_the_interval(name, q_offset):
    mask = STREAMING[name]
    scalars, first_keys = streaming_mask(mask.program)
    i = q_offset + np.arange(9)[:, None]
    j = np.arange(17)[None, :]
    below_end = (j < scalars.key_end) & (j <= i + scalars.hi)
    found = kept(scalars, 9, 17, q_offset) | (below_end & (j < first_keys))
    assert (found == mask.to_dense(9, 17, q_offset=q_offset).numpy()).all()


@pytest.mark.parametrize(
    "mask",
    [
        *(OTHERS[name] for name in OTHERS if name not in ("streaming", "union")),
        masks.prefix_lm(4),
        masks.streaming_llm(3, 5) & masks.Band(-9, None),
        masks.streaming_llm(3, 5) & masks.KeyRange(1, None),
        masks.streaming_llm(3, 5) & masks.streaming_llm(2, 6),
        masks.Band(-2, None) | masks.KeyRange(1, 4),
        masks.Band(-2, None) | masks.KeyRange(0, 4) | masks.KeyRange(7, 9),
        masks.causal()
        & (masks.Band(-2, None) | (masks.KeyRange(0, 4) & masks.KeyModulo(2, 0, 1))),
    ],
)
def test_no_other_union_is_reduced(mask):
    assert streaming_mask(mask.program) is None
