"""The bucketing function."""

import math

import pytest

from portattn import masks
from portattn.tuning_db.key import bucket, distance, power_of_two


@pytest.mark.parametrize(
    ("size", "expected"), [(0, 0), (1, 1), (2, 2), (3, 4), (1024, 1024), (1025, 2048)]
)
def test_power_of_two(size, expected):
    assert power_of_two(size) == expected


def test_lengths_share_a_bucket_and_dimensions_do_not(problem, vary):
    assert bucket(problem) == bucket(vary(problem, seqlen_q=513, seqlen_k=700))
    assert bucket(problem) != bucket(vary(problem, seqlen_q=512))
    for other in (
        {"head_dim": 128},
        {"dtype": "float16"},
        {"num_kv_heads": 2},
        {"features": frozenset({"softcap"})},
    ):
        assert bucket(problem) != bucket(vary(problem, **other))
    assert bucket(problem) == bucket(vary(problem, device="cpu:0", features=frozenset({"lse"})))


@pytest.mark.parametrize(
    ("mask", "kind", "causal", "window", "block"),
    [
        (masks.causal(), "causal", True, 0, 0),
        (masks.sliding_window(256), "band", True, 256, 0),
        (masks.local(100, 100), "band", False, 128, 0),
        (masks.sparse_transformer_strided(128), "band+stride", True, 128, 128),
        (masks.causal() & masks.KeyModulo(8, 0, 1), "step", True, 0, 8),
        (masks.documents([0, 10, 20]) & masks.causal(), "ids", True, 0, 0),
        (~masks.causal(), "not", True, 0, 0),
    ],
)
def test_masks_are_told_apart(mask, kind, causal, window, block, problem, vary):
    key = bucket(vary(problem, program=mask.program))
    assert (key.mask_kind, key.causal, key.window_bucket, key.block_size) == (
        kind,
        causal,
        window,
        block,
    )


def test_longformer_is_not_a_plain_band(problem, vary):
    key = bucket(vary(problem, program=masks.longformer(512, 64).program))
    assert key.mask_kind == "band+range"
    assert key.window_bucket == 512


def test_a_newer_opcode_gets_a_bucket_of_its_own(problem, vary):
    assert bucket(vary(problem, program=(9, 999, 1))).mask_kind == "unknown"


def test_distance_counts_doublings(problem, vary):
    here = bucket(problem)
    assert distance(here, here) == 0
    assert distance(here, bucket(vary(problem, seqlen_q=2048, seqlen_k=2048))) == 2
    assert distance(here, bucket(vary(problem, batch=4))) == 2
    assert distance(here, bucket(vary(problem, num_kv_heads=2))) == 2
    assert distance(here, bucket(vary(problem, head_dim=128))) == math.inf
    assert distance(here, bucket(vary(problem, seqlen_q=1))) == math.inf
    assert distance(here, bucket(vary(problem, program=masks.causal().program))) == math.inf


def test_labels_read_well(problem, vary):
    key = bucket(
        vary(problem, num_kv_heads=2, program=masks.sliding_window(256).program, head_dim_v=32)
    )
    assert key.label == "b1 h8 kv2 s1024 d64 dv32 float32 causal band~256"
