"""The Triton forward in the interpreter: values only, no races and no layouts."""

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from portattn import masks
from portattn.backends import stream_memory
from tests.strategies import mask_expressions
from tests.triton.interpreter.calls import Call, check

INF = math.inf
PRESETS = {
    "dense": None,
    "causal": masks.causal(),
    "local": masks.local(20, 5),
    "window": masks.sliding_window(40),
    "longformer": masks.longformer(16, 3),
    "longformer_dilated": masks.longformer(16, [3, 70], dilation=4),
    "bigbird": masks.bigbird(16, 1, 3, 1, 0),
    "strided": masks.sparse_transformer_strided(8),
    "fixed": masks.sparse_transformer_fixed(8),
    "dilated": masks.dilated(12, 3),
    "prefix": masks.prefix_lm(45),
    "streaming": masks.streaming_llm(4, 20),
    "documents": masks.documents([0, 30, 77, 150]),
    "causal_documents": masks.documents([0, 30, 77, 150]) & masks.causal(),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    check(Call(PRESETS[name], seqlen_q=150, num_heads=1))


@pytest.mark.parametrize("name", ["dense", "causal", "strided", "causal_documents"])
def test_descriptors(name):
    # Lengths that are no multiple of a tile: a descriptor must not read the next head.
    call = Call(PRESETS[name], seqlen_q=150, num_heads=4, num_kv_heads=2, tma=True)
    call.value[:, 1:] *= 100.0
    check(call)


@pytest.mark.parametrize("name", ["causal", "documents", "strided", "fixed"])
def test_float16(name):
    check(Call(PRESETS[name], seqlen_q=130, num_heads=1, dtype=torch.float16, head_dim=32))


# No shrinking: a case takes a second here. The plan's own property tests shrink.
@settings(max_examples=20, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(case=mask_expressions(depth=3, max_len=80))
def test_random_masks(case):
    check(
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


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.longformer(16, 3)])
def test_cut_rows(mask):
    call = Call(
        mask,
        num_heads=2,
        seqlen_q=70,
        workers=16,
        min_piece=1,
        seqlen_k=200,
        q_offset=100,
    )
    assert call.schedule().num_slots > 0
    first = check(call)
    # The counters are back at zero, and the result is the same to the bit.
    assert all(not counters.any() for counters in stream_memory._counters.kept.values())
    second = call.run()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def strided_with_long_rows():
    return masks.sparse_transformer_strided(4) | masks.KeyRange(0, 8)


def test_passes_with_cut_rows_and_sinks():
    call = Call(
        strided_with_long_rows(),
        seqlen_q=120,
        num_heads=2,
        block_q=16,
        workers=16,
        min_piece=1,
        sinks=torch.tensor([0.5, -INF]),
    )
    assert call.plan().num_passes > 1
    assert call.schedule().num_slots > 0
    check(call)


def test_running_rows_of_float16_passes():
    check(Call(strided_with_long_rows(), seqlen_q=90, dtype=torch.float16, head_dim_v=24))


def test_rows_without_keys():
    output, lse = check(Call(masks.Band(10, 20), seqlen_q=70, seqlen_k=50))
    assert not output[:, :, 45:].any()
    assert (lse[:, :, 45:] == -INF).all()


def test_rows_without_keys_in_one_piece_only():
    mask = masks.KeyRange(0, 40) | (masks.QueryRange(5, 9) & masks.KeyRange(0, 160))
    call = Call(mask, seqlen_q=30, seqlen_k=160, workers=64, min_piece=1)
    assert call.schedule().num_slots > 0
    check(call)


def test_rows_without_keys_in_every_piece():
    mask = masks.QueryRange(3, 8) & masks.KeyRange(0, 160)
    call = Call(mask, seqlen_q=30, seqlen_k=160, workers=64, min_piece=1)
    assert call.schedule().num_slots > 0
    check(call)


def test_rows_without_keys_in_one_pass_only():
    check(Call(masks.dilated(6, 5) & masks.QueryRange(0, 30) | masks.KeyRange(0, 1), seqlen_q=60))


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(16, 48), (20, 36), (13, 7), (64, 16), (1, 1)]
)
def test_widths(head_dim, head_dim_v):
    check(Call(masks.causal(), seqlen_q=70, head_dim=head_dim, head_dim_v=head_dim_v))


def test_padded_widths_through_descriptors():
    check(Call(masks.causal(), seqlen_q=70, head_dim=24, head_dim_v=40, tma=True))


def test_heads_share_keys():
    check(Call(masks.causal(), batch=2, num_heads=6, num_kv_heads=2, seqlen_q=40, head_group=4))


def test_layouts_by_batch_and_head():
    mask = masks.per_head([masks.causal(), masks.local(3, 3) & masks.QueryRange(0, 40)])
    both = masks.per_batch([mask, masks.KeyRange(0, 0), masks.documents([0, 20, 90])])
    check(Call(both, batch=3, num_heads=2, seqlen_q=90))


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "q_offset"), [(1, 1, 0), (1, 100, 99), (100, 1, 0), (33, 65, 32)]
)
def test_lengths(seqlen_q, seqlen_k, q_offset):
    check(Call(masks.causal(), seqlen_q=seqlen_q, seqlen_k=seqlen_k, q_offset=q_offset, tma=True))


def test_no_keys():
    output, lse = Call(None, seqlen_q=20, seqlen_k=0, tma=True).run()
    assert not output.any()
    assert (lse == -INF).all()


def test_nothing_to_do():
    output, _ = Call(None, batch=0, seqlen_q=20, seqlen_k=20).run()
    assert output.numel() == 0


@pytest.mark.parametrize("tma", [False, True])
def test_strides(tma):
    call = Call(masks.causal(), batch=2, seqlen_q=50, tma=tma)
    call.query, call.key = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.query, call.key)
    )
    call.value = call.value[:1].expand(2, -1, -1, -1)
    check(call)


def test_unaligned_rows():
    call = Call(masks.causal(), seqlen_q=50, tma=True)
    padded = torch.zeros(*call.key.shape[:3], 17)
    padded[..., 1:] = call.key
    call.key = padded[..., 1:]
    check(call)


@pytest.mark.parametrize("scale", [0.0, -0.4, 1.5])
def test_scales(scale):
    check(Call(masks.causal(), seqlen_q=70, scale=scale))


SLOPES = torch.tensor([[0.5, 0.1], [0.0, -0.2]])
FEATURES = {
    "softcap": {"softcap": 2.0},
    "slopes": {"alibi_slopes": SLOPES[0], "q_offset": 3},
    "slopes_by_batch": {"alibi_slopes": SLOPES},
    "sinks": {"sinks": torch.tensor([1.0, -2.0])},
    "bias": {"bias": torch.randn(2, 2, 70, 70, generator=torch.Generator().manual_seed(1))},
    "bias_of_keys": {"bias": torch.linspace(-1, 1, 70).expand(2, 2, 70, 70)},
}


@pytest.mark.parametrize("name", FEATURES)
def test_score_terms(name):
    check(Call(masks.causal() | masks.KeyRange(0, 40), batch=2, seqlen_q=70, **FEATURES[name]))


def test_all_score_terms_together():
    features = (
        FEATURES["softcap"] | FEATURES["slopes_by_batch"] | FEATURES["bias"] | FEATURES["sinks"]
    )
    check(Call(strided_with_long_rows(), batch=2, seqlen_q=70, scale=-0.3, **features))


def test_bias_of_minus_infinity():
    # A row of it in a full tile, another in all tiles.
    bias = torch.zeros(1, 1, 64, 96)
    bias[..., 5, :32] = -INF
    bias[..., 6, :] = -INF
    output, lse = check(
        Call(None, seqlen_q=64, seqlen_k=96, bias=bias.expand(1, 2, 64, 96), sinks=None)
    )
    assert not output[:, :, 6].any()
    assert (lse[:, :, 6] == -INF).all()


def test_sinks_of_rows_without_keys():
    sinks = torch.tensor([0.7, -1.0])
    output, lse = check(Call(masks.Band(10, 20), seqlen_q=70, seqlen_k=50, sinks=sinks))
    assert not output[:, :, 45:].any()
    torch.testing.assert_close(lse[0, :, 45], sinks)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("poison", [math.nan, INF])
def test_a_poisoned_key_reaches_its_rows(poison):
    call = Call(masks.causal(), seqlen_q=70)
    call.value[:, :, 50] = poison
    output, _ = call.run()
    assert output[:, :, :32].isfinite().all()
    assert not output[:, :, 50:].isfinite().any()


def test_no_lse():
    _, lse = check(Call(masks.causal(), seqlen_q=40, store_lse=False))
    assert lse is None


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 64), (64, 32), (64, 128)])
def test_tiles(block_q, block_k):
    check(Call(PRESETS["longformer"], seqlen_q=150, block_q=block_q, block_k=block_k))
