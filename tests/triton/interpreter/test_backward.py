"""The Triton backward in the interpreter: values only, no races and no layouts."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from portattn import masks
from tests.strategies import mask_expressions
from tests.triton.interpreter.backward_calls import Backward, check_backward
from tests.triton.interpreter.calls import Call

PRESETS = {
    "dense": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(40),
    "longformer_dilated": masks.longformer(16, [3, 70], dilation=4),
    "bigbird": masks.bigbird(16, 1, 3, 1, 0),
    "strided": masks.sparse_transformer_strided(8),
    "dilated": masks.dilated(12, 3),
    "causal_documents": masks.documents([0, 30, 77, 120]) & masks.causal(),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    check_backward(Backward(Call(PRESETS[name], seqlen_q=120, num_heads=1)))


@pytest.mark.parametrize("name", ["causal", "dilated", "causal_documents"])
def test_float16(name):
    call = Call(PRESETS[name], seqlen_q=100, num_heads=1, dtype=torch.float16, head_dim=32)
    check_backward(Backward(call))


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.longformer(16, 3)])
def test_cut_rows_and_columns(mask):
    call = Call(mask, seqlen_q=70, workers=16, min_piece=1, seqlen_k=200, q_offset=100)
    backward = Backward(call)
    check_backward(backward)
    assert all(side.num_slots for side in backward.made._sides)
    first, again = backward.run(), backward.run()
    assert all(torch.equal(getattr(first, n), getattr(again, n)) for n in backward.wanted)


def test_groups_of_heads():
    check_backward(Backward(Call(masks.causal(), 2, 4, 2, seqlen_q=50, head_dim=20, head_dim_v=5)))


def test_masks_of_heads_of_one_group():
    mask = masks.per_head(
        [masks.causal(), masks.dilated(8, 2), masks.sliding_window(9), masks.All()]
    )
    check_backward(Backward(Call(mask, 1, 4, 2, seqlen_q=70)))


def test_rows_that_keep_nothing():
    mask = masks.causal() & masks.KeyRange(30, 60)
    found = check_backward(Backward(Call(mask, seqlen_q=80, num_heads=1)))
    assert not found.query[:, :, :30].any()
    assert not found.key[:, :, :30].any()
    assert not found.value[:, :, 60:].any()


TERMS = {
    "softcap": {"softcap": 2.0},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.1])},
    "slopes_of_batches": {"alibi_slopes": torch.tensor([[0.5, 0.1], [0.3, 0.2]])},
    "sinks": {"sinks": torch.tensor([0.5, -torch.inf])},
    "bias": {"bias": torch.randn(2, 2, 40, 60)},
    "bias_of_all": {"bias": torch.randn(40, 60)},
    "bias_of_heads": {"bias": torch.randn(2, 40, 60)},
    "bias_of_keys": {"bias": torch.randn(2, 1, 1, 60)},
    "bias_of_rows": {"bias": torch.randn(2, 1, 40, 1)},
    "one_bias": {"bias": torch.randn(1), "alibi_slopes": torch.tensor([0.5, 0.1])},
    "all": {
        "softcap": 2.0,
        "alibi_slopes": torch.tensor([0.5, 0.1]),
        "sinks": torch.tensor([0.5, 2.0]),
        "bias": torch.randn(1, 2, 40, 60),
        "scale": -0.7,
    },
}


@pytest.mark.parametrize("name", TERMS)
def test_terms(name):
    mask = masks.causal() & ~masks.KeyRange(0, 12) if name in ("sinks", "all") else masks.causal()
    call = Call(
        mask, 2, 2, 1, seqlen_q=40, seqlen_k=60, q_offset=10, workers=4, min_piece=1, **TERMS[name]
    )
    check_backward(Backward(call))


@pytest.mark.parametrize("wanted", [("query",), ("key",), ("value", "sinks"), ("sinks",)])
def test_what_nobody_asks_for_is_not_computed(wanted):
    call = Call(masks.causal(), seqlen_q=40, num_heads=1, sinks=torch.zeros(1))
    check_backward(Backward(call, wanted=wanted, with_lse=False))


def test_strides():
    call = Call(masks.causal(), 2, 2, seqlen_q=40)
    for name in ("query", "key", "value"):
        tensor = getattr(call, name)
        setattr(call, name, tensor.transpose(1, 2).contiguous().transpose(1, 2))
    # What sum() gives: one number, expanded.
    check_backward(Backward(call, seed=torch.ones(()).expand(2, 2, 40, 16)))


# No shrinking: a case takes a second here. The plan's own property tests shrink.
@settings(max_examples=6, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(case=mask_expressions(depth=3, max_len=80))
def test_random_masks(case):
    check_backward(
        Backward(
            Call(
                case.mask,
                batch=case.batch,
                num_heads=case.num_heads,
                seqlen_q=case.seqlen_q,
                seqlen_k=case.seqlen_k,
                q_offset=case.q_offset,
                workers=2,
                min_piece=1,
            )
        )
    )
