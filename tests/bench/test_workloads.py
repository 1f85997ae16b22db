"""The benchmark's problems: named sets, words, kept pairs, bytes and roofline."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from portattn.bench import flex_blocks, workloads
from portattn.bench.limits import Limits
from portattn.bench.patterns import Pattern, document_ends, document_ids
from portattn.bench.roofline import roofline
from portattn.errors import ConfigError

H100 = Limits(matmul_tflops=800.0, read_tbps=3.0, matmul_per_exp=256.0)


def test_the_forward_set_is_the_18_cells():
    rows = workloads.preset("forward")
    cells = {(row.head_dim, row.seqlen_q, row.pattern.kind) for row in rows}
    assert len(rows) == len(cells) == 18
    assert all(row.batch * row.seqlen_q == 16384 for row in rows)
    assert all(row.num_heads * row.head_dim == 2048 for row in rows)
    assert (rows[0].head_dim, rows[0].seqlen_q) == (128, 16384)


def test_names_are_unique_and_sets_are_known():
    names = [row.name for name in workloads.PRESETS for row in workloads.preset(name)]
    assert len(names) == len(set(names))
    with pytest.raises(ConfigError, match="must be one of forward, sparse"):
        workloads.preset("fast")


def test_the_decode_set_has_full_and_random_lengths():
    rows = workloads.preset("decode")
    assert {(row.batch, row.seqlen_k) for row in rows if row.lengths == "full"} == {
        (1, 131072), (16, 8192), (64, 8192), (128, 4096),
    }  # fmt: skip
    drawn = next(row for row in rows if row.lengths == "random")
    lengths = drawn.kv_lengths()
    assert lengths.min() >= 1
    assert lengths.max() <= drawn.seqlen_k
    assert drawn.kept_pairs() == int(lengths.sum()) * 32
    assert drawn.kv_bytes() == 2 * int(lengths.sum()) * 8 * 128 * 2


@pytest.mark.parametrize(
    "text",
    [
        "full", "causal", "sliding_window:5", "longformer:6:3", "bigbird:4:2:3:1",
        "local_strided:4", "sparse_transformer_strided:4", "random_blocks:4:3", "documents:3",
        "causal_documents:3",
    ],
)  # fmt: skip
def test_both_forms_of_a_pattern_mean_the_same(text):
    seqlen, (kind, *values) = 32, text.split(":")
    pattern = Pattern(kind, tuple(map(int, values)))
    assert pattern.text == text
    mask, mask_mod = pattern.mask(seqlen), pattern.mask_mod(seqlen, torch.device("cpu"))
    i, j = torch.arange(seqlen)[:, None], torch.arange(seqlen)[None, :]
    if mask is None:
        assert mask_mod is None
        return
    theirs = mask_mod(0, 0, i, j).expand(seqlen, seqlen)
    assert torch.equal(mask.to_dense(seqlen, seqlen, 0), theirs)
    row = workloads.Workload("problem", 2, 3, 3, seqlen, seqlen, 16, pattern)
    assert row.kept_pairs() == 2 * 3 * int(theirs.sum())


@pytest.mark.parametrize(
    "text",
    [
        "causal", "longformer:64:8", "bigbird:16:2:3:1", "sparse_transformer_strided:16",
        "causal_documents:3",
    ],
)  # fmt: skip
def test_block_masks_are_those_of_create_block_mask(text, monkeypatch):
    seqlen, block, (kind, *values) = 200, 32, text.split(":")
    mask_mod = Pattern(kind, tuple(map(int, values))).mask_mod(seqlen, torch.device("cpu"))
    monkeypatch.setattr(flex_blocks, "_PAIRS_AT_ONCE", 3 * block * 224)  # 3 bands
    found = flex_blocks.block_mask(mask_mod, seqlen, seqlen, torch.device("cpu"), block)
    theirs = create_block_mask(
        mask_mod, None, None, seqlen, seqlen, device="cpu", BLOCK_SIZE=block
    )
    assert found.seq_lengths == theirs.seq_lengths
    assert found.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(found, name), getattr(theirs, name)), name


def test_documents_cover_the_tokens():
    ends = document_ends(1000, 7, 1)
    assert ends[0] == 0
    assert ends[-1] == 1000
    assert (ends.diff() > 0).all()
    assert not torch.equal(ends, document_ends(1000, 7, 2))
    ids = document_ids(ends)
    assert ids.shape == (1000,)
    assert ids.bincount().tolist() == ends.diff().tolist()


def test_words():
    row = workloads.parse("b2 h8 kv2 sq1 sk512 d64 float16 lengths:random")
    assert (row.batch, row.num_heads, row.num_kv_heads) == (2, 8, 2)
    assert (row.seqlen_q, row.seqlen_k, row.head_dim) == (1, 512, 64)
    assert (row.dtype, row.lengths, row.metric) == ("float16", "random", "bandwidth")
    row = workloads.parse("h4 s256 d32 sliding_window:64")
    assert row.pattern == Pattern("sliding_window", (64,))
    assert (row.batch, row.dtype, row.metric) == (1, "bfloat16", "time")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("h4 s256", "needs h, s"),
        ("h4 kv3 s256 d64", "kv that divides h"),
        ("h4 s256 d64 sliding:64", "must be one of full, causal, sliding_window:N"),
        ("h4 s256 d64 longformer:64", "longformer:WINDOW:GLOBAL"),
        ("h4 s256 d64 softcap:x", "'softcap:x' is not known"),
        ("h4 sq1 sk256 d64 causal", "needs sq = sk"),
    ],
)
def test_wrong_words(text, why):
    with pytest.raises(ConfigError, match=why):
        workloads.parse(text)


def test_roofline_by_hand():
    """D64, D128 and D256, as in the Hopper arithmetic: exponentials take 1, 1/2, 1/4 of mma."""
    for head_dim, share in ((64, 1.0), (128, 0.5), (256, 0.25)):
        row = workloads.Workload("problem", 1, 16, 16, 16384, 16384, head_dim)
        pairs = row.kept_pairs()
        assert pairs == 16 * 16384**2
        bounds = roofline(row, pairs, H100)
        assert bounds.mma_ms == pytest.approx(4 * head_dim * 16 * 16384**2 / 800e12 * 1e3)
        assert bounds.exp_ms == pytest.approx(bounds.mma_ms * share * (1 + 2 / 128))
        assert bounds.hbm_ms == pytest.approx(4 * 16 * 16384 * head_dim * 2 / 3e12 * 1e3)
    assert bounds.bound == "mma"
    assert bounds.least_ms == bounds.mma_ms


def test_decode_is_bound_by_memory():
    row = workloads.preset("decode")[1]
    assert row.kv_bytes() == 2 * 131072 * 8 * 128 * 2
    bounds = roofline(row, row.kept_pairs(), H100)
    assert bounds.bound == "hbm"
    assert bounds.least_ms == pytest.approx((row.kv_bytes() + 2 * 32 * 128 * 2) / 3e9)
    unknown = roofline(row, row.kept_pairs(), Limits(800.0, 3.0))
    assert unknown.exp_ms is None
