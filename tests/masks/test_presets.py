"""Presets against their independent definitions."""

import numpy as np
import pytest
import torch

from portattn import masks
from portattn.errors import MaskError
from tests.presets import HEAD_TABLE, PRESETS, expected

SIZES = [(1, 1, 0), (65, 65, 0), (200, 200, 0), (33, 200, 167), (70, 31, 5), (40, 300, 0)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("case", PRESETS, ids=lambda case: case.name)
def test_preset_keeps_what_its_source_says(case, sizes):
    seqlen_q, seqlen_k, q_offset = sizes
    for b in range(case.batch):
        for h in range(case.num_heads):
            kept = case.mask.to_dense(seqlen_q, seqlen_k, q_offset, b=b, h=h).numpy()
            np.testing.assert_array_equal(
                kept, expected(case, seqlen_q, seqlen_k, q_offset, b, h), err_msg=f"b={b} h={h}"
            )


@pytest.mark.parametrize("case", PRESETS, ids=lambda case: case.name)
def test_preset_survives_program_and_json(case):
    assert masks.from_program(case.mask.program, case.mask.data) == case.mask
    assert masks.from_json(case.mask.to_json()) == case.mask
    assert case.mask.batch == (case.batch if case.batch > 1 else None)
    assert case.mask.num_heads == (case.num_heads if case.num_heads > 1 else None)


def test_strided_counts_the_window_as_the_paper_does():
    # The paper's A(1) reaches i - stride, one key further than `i - j < stride`; A(2) has that
    # key.
    row = masks.sparse_transformer_strided(8).to_dense(20, 20)[17]
    assert row.nonzero().flatten().tolist() == [1, *range(9, 18)]


def test_sliding_window_counts_like_hugging_face_and_local_like_flash_attn():
    assert int(masks.sliding_window(4).to_dense(32, 32)[20].sum()) == 4
    assert int(masks.local(4, 0).to_dense(32, 32)[20].sum()) == 5
    assert masks.sliding_window(5) == masks.local(4, 0)
    assert int(masks.longformer(8).to_dense(32, 32)[20].sum()) == 9


def test_longformer_counts_of_first_tokens_and_positions_mean_the_same():
    by_count, by_position = masks.longformer(6, 3), masks.longformer(6, [2, 0, 1, 1])
    assert torch.equal(by_count.to_dense(40, 40), by_position.to_dense(40, 40))


def test_documents_of_a_mutated_tensor_stay_as_they_were():
    lengths = torch.tensor([0, 3, 6], dtype=torch.int32)
    mask = masks.documents(lengths)
    before = mask.to_dense(6, 6)
    lengths[1] = 5
    assert torch.equal(mask.to_dense(6, 6), before)


def test_dense_takes_batches_and_heads():
    table = torch.from_numpy(HEAD_TABLE[:, :20, :20])
    mask = masks.dense(table[None])
    assert (mask.batch, mask.num_heads) == (1, 2)
    assert torch.equal(mask.to_dense(20, 20, h=1), table[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.local(-1, 0), r"left is -1; it must be in \[0"),
        (lambda: masks.local(0, 2.5), "right is 2.5; it must be an integer"),
        (lambda: masks.sliding_window(0), "sliding_window's n is 0"),
        (lambda: masks.longformer(0), "window is 0"),
        (lambda: masks.longformer(8, -1), "global_tokens is -1"),
        (lambda: masks.longformer(8, [-3]), "positions hold -3"),
        (lambda: masks.longformer(8, 1, 0), "dilation is 0"),
        (lambda: masks.bigbird(block=0), "bigbird's block is 0"),
        (lambda: masks.bigbird(window_blocks=0), "window_blocks is 0"),
        (lambda: masks.bigbird(random_blocks=-1), "random_blocks is -1"),
        (lambda: masks.bigbird(seed=-1), "seed is -1"),
        (lambda: masks.sparse_transformer_strided(0), "stride is 0"),
        (lambda: masks.sparse_transformer_fixed(8, 9), r"summary is 9; it must be in \[0, 8\]"),
        (lambda: masks.prefix_lm(-1), "prefix_lm's n is -1"),
        (lambda: masks.streaming_llm(-1, 4), "sinks is -1"),
        (lambda: masks.documents([1, 4]), "start at 0"),
        (lambda: masks.documents([0, 4, 3]), "never fall"),
        (lambda: masks.documents([0]), "at least 2"),
        (lambda: masks.documents([]), "at least 2"),
        (lambda: masks.documents([[0, 4]]), "1 dimensions"),
        (lambda: masks.documents([0.0, 4.0]), "dtype float64"),
        (lambda: masks.padding([3, -1]), ">= 0"),
        (lambda: masks.padding([]), "one length"),
        (lambda: masks.block_sparse(torch.ones(3, 3), 4), "torch.float32"),
        (lambda: masks.block_sparse(torch.ones(3, 3, dtype=torch.bool), 0), "block_q is 0"),
        (lambda: masks.dense(torch.ones(9, dtype=torch.bool)), "2 or 3 or 4 dimensions"),
        (lambda: masks.dense(torch.ones(3, 3, dtype=torch.bool), max_elements=8), "at most 8"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(MaskError, match=message):
        make()
