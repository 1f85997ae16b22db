"""The Triton decode in the interpreter: values only, no races and no layouts."""

import dataclasses
import math

import pytest
import torch

from portattn import masks
from portattn.backends import stream_memory
from portattn.backends.triton import decode, decode_launch
from portattn.backends.triton.limits import limits_of
from portattn.conformance import CASES
from portattn.conformance.suite import outcome
from tests.triton.interpreter.decode_calls import Call, check, integers

INF = math.inf
RAGGED = (0, 1, 16, 37, 100, 99)
MASKS = {
    "dense": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(20),
    "local": masks.local(30, 4),
    "key_range": masks.KeyRange(7, 60) & masks.causal(),
    "ahead": masks.Band(-3, None),
    "behind": masks.Band(None, -40),
    "streaming": masks.streaming_llm(5, 20),
    "streaming_wide": masks.streaming_llm(40, 33) & masks.causal(),
    "nothing": masks.KeyRange(0, 5) & masks.KeyRange(9, 20),
}


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("name", MASKS)
def test_masks_with_lengths(name, seqlen_q):
    call = Call(
        MASKS[name], lengths=RAGGED, seqlen_q=seqlen_q, num_heads=2, num_kv_heads=1, pieces=9
    )
    check(call)


@pytest.mark.parametrize("name", ["causal", "local", "streaming_wide"])
def test_many_rows_with_lengths(name):
    check(Call(MASKS[name], lengths=(75, 3, 100), seqlen_q=70, block_q=64, num_heads=2))


@pytest.mark.parametrize("q_offset", [0, 50, 99, 300, -30])
@pytest.mark.parametrize("name", ["dense", "window", "streaming", "behind"])
def test_masks_without_lengths(name, q_offset):
    check(Call(MASKS[name], seqlen_q=2, q_offset=q_offset))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (8, 2), (7, 1), (16, 2)])
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_heads_share_keys(num_heads, num_kv_heads, seqlen_q):
    call = Call(
        masks.causal(),
        lengths=(61, 5),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seqlen_q=seqlen_q,
    )
    check(call)


@pytest.mark.parametrize(("pieces", "min_piece"), [(1, 1), (5, 2), (40, 1), (64, 4)])
def test_pieces(pieces, min_piece):
    check(Call(masks.causal(), lengths=RAGGED, seqlen_q=2, pieces=pieces, min_piece=min_piece))


def test_cut_sequences_give_the_same_bits_again():
    call = Call(masks.causal(), lengths=(90, 3, 100), pieces=30)
    first = check(call)
    assert all(not counters.any() for counters in stream_memory._counters.kept.values())
    second = call.run()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_pieces_follow_lengths_not_the_capacity():
    # A tenth of the capacity is used: as many programs have work as if all of it were.
    short = Call(lengths=(100, 100), seqlen_k=1000, pieces=8)
    check(short)
    assert integers(short)["max_pieces"] == integers(Call(lengths=(9, 9), pieces=8))["max_pieces"]


def test_more_sequences_than_one_plan(monkeypatch):
    monkeypatch.setattr(decode_launch, "PLAN_BATCHES", (2, 4))
    check(Call(masks.causal(), lengths=(3, 0, 31, 32, 1, 9, 30, 31, 2), seqlen_k=32))


def test_lengths_past_the_cache_and_below_zero():
    call = Call(masks.causal(), lengths=(130, -4), seqlen_q=2)
    output, lse = check(call)
    assert not output[1].any()
    assert (lse[1] == -INF).all()


def test_long_lengths():
    check(Call(masks.causal(), lengths=(80, 33), lengths_dtype=torch.int64))


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(16, 48), (20, 36), (13, 7), (64, 16), (1, 1), (40, 256)]
)
def test_widths(head_dim, head_dim_v):
    check(Call(lengths=(70, 3), head_dim=head_dim, head_dim_v=head_dim_v, num_heads=8))


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 32), (32, 16), (64, 64), (16, 128)])
def test_tiles(block_q, block_k):
    lengths = (0, 37, 100)
    check(Call(masks.local(50, 3), lengths=lengths, seqlen_q=20, block_q=block_q, block_k=block_k))


@pytest.mark.parametrize("name", ["causal", "window"])
def test_float16(name):
    call = Call(MASKS[name], lengths=(100, 55), seqlen_q=3, dtype=torch.float16, head_dim=32)
    check(call)


def test_bshd_caches():
    call = Call(masks.causal(), lengths=(100, 55), seqlen_q=3)
    call.query, call.key, call.value = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.query, call.key, call.value)
    )
    check(call)


def test_unaligned_rows_and_shared_values():
    call = Call(masks.causal(), batch=2)
    padded = torch.zeros(*call.key.shape[:3], 17)
    padded[..., 1:] = call.key
    call.key = padded[..., 1:]
    call.value = call.value[:1].expand(2, -1, -1, -1)
    check(call)


@pytest.mark.parametrize("scale", [0.0, -0.4, 1.5])
def test_scales(scale):
    check(Call(masks.causal(), lengths=(70, 20), scale=scale))


GENERATOR = torch.Generator().manual_seed(1)
FEATURES = {
    "softcap": {"softcap": 2.0},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, -0.2])},
    "slopes_by_batch": {"alibi_slopes": torch.rand(2, 4, generator=GENERATOR)},
    "sinks": {"sinks": torch.tensor([1.0, -2.0, 0.3, -INF])},
    "bias": {"bias": torch.randn(2, 4, 3, 100, generator=GENERATOR)},
    "bias_of_keys": {"bias": torch.linspace(-1, 1, 100).expand(2, 4, 3, 100)},
    "bias_of_rows": {"bias": torch.linspace(-1, 1, 3)[:, None].expand(2, 4, 3, 100)},
}


@pytest.mark.parametrize("lengths", [None, (77, 2)])
@pytest.mark.parametrize("name", FEATURES)
def test_score_terms(name, lengths):
    check(Call(masks.causal(), lengths=lengths, seqlen_q=3, **FEATURES[name]))


def test_all_score_terms_together():
    features = (
        FEATURES["softcap"] | FEATURES["slopes_by_batch"] | FEATURES["bias"] | FEATURES["sinks"]
    )
    check(Call(masks.local(40, 1), lengths=(99, 50), seqlen_q=3, scale=-0.3, **features))


def test_bias_of_minus_infinity():
    bias = torch.zeros(2, 4, 2, 100)
    bias[:, :, 0, :40] = -INF
    bias[:, :, 1, :] = -INF
    output, lse = check(Call(seqlen_q=2, bias=bias))
    assert not output[:, :, 1].any()
    assert (lse[:, :, 1] == -INF).all()


def test_sinks_of_rows_without_keys():
    sinks = torch.tensor([0.7, -1.0, 0.0, 3.0])
    output, lse = check(Call(lengths=(0, 50), sinks=sinks))
    assert not output[0].any()
    torch.testing.assert_close(lse[0, :, 0], sinks)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("poison", [math.nan, INF])
def test_a_poisoned_key_reaches_its_rows(poison):
    call = Call(masks.causal(), lengths=(80, 80))
    call.value[0, :, 50] = poison
    output, _ = call.run()
    assert not output[0].isfinite().any()
    assert output[1].isfinite().all()


def test_no_lse():
    _, lse = check(Call(lengths=(40, 3), store_lse=False))
    assert lse is None


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The kernel of the registry, where no GPU is."""
    monkeypatch.setattr(decode, "device_reasons", lambda problem: [])
    monkeypatch.setattr(decode, "device_limits", lambda device: limits_of("sm_90", 4))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name.startswith("kv_lengths_")]
    + ["mqa_decode_7", "few_queries", "nan_key_decode", "causal_end", "local"],
)
def test_conformance(name):
    result = outcome("triton_decode", CASES[name], "float32")
    if name in ("causal_end", "local"):
        assert "forward kernel is faster" in result.detail
    else:
        assert result.status == "pass", result.detail


@pytest.mark.usefixtures("on_the_cpu")
def test_masks_that_are_not_planned_on_the_device_are_refused():
    case = CASES["kv_lengths_decode"]
    other = dataclasses.replace(case, mask=lambda: masks.longformer(16, 3))
    result = outcome("triton_decode", other, "float32")
    assert result.status == "refused"
    assert "joined by &" in result.detail
