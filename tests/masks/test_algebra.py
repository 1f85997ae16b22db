"""The algebra, identity by content, and what a caller cannot change afterwards."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from portattn import masks
from portattn.errors import MaskError
from tests.strategies import mask_expressions

A, B, C = masks.Band(-5, 2), masks.KeyModulo(3, 0, 2), masks.KeySet([1, 4, 9])


def dense(mask, **where):
    return mask.to_dense(30, 30, **where)


def test_operators_are_those_of_sets():
    assert torch.equal(dense(A & B), dense(A) & dense(B))
    assert torch.equal(dense(A | C), dense(A) | dense(C))
    assert torch.equal(dense(~(A | C)), ~(dense(A) | dense(C)))
    assert torch.equal(dense((A & ~C) | B), (dense(A) & ~dense(C)) | dense(B))


@settings(max_examples=100, deadline=None)
@given(mask_expressions(depth=3, max_len=90), mask_expressions(depth=1, max_len=90))
def test_operators_on_random_expressions(case, other):
    sizes = (case.seqlen_q, case.seqlen_k, case.q_offset)
    second = masks.Band(-7, 11) if other.mask.data else other.mask
    for b in range(case.batch):
        for h in range(case.num_heads):
            one = case.mask.to_dense(*sizes, b=b, h=h)
            two = second.to_dense(*sizes, b=b, h=h)
            assert torch.equal((case.mask & second).to_dense(*sizes, b=b, h=h), one & two)
            assert torch.equal((second | case.mask).to_dense(*sizes, b=b, h=h), one | two)
            assert torch.equal((~case.mask).to_dense(*sizes, b=b, h=h), ~one)


def test_nested_operators_are_flat_and_trivial_ones_vanish():
    assert (A & B) & C == A & (B & C)
    assert len((A & (B & C)).operands) == 3
    assert len((A | (B | C)).operands) == 3
    assert (A | B) & C != A | (B & C)
    assert ~~A is A
    assert ~~(A & B) == A & B
    assert A & A is A
    assert A & masks.All() is A
    assert masks.All() & masks.All() == masks.All()
    assert A | masks.All() == masks.All()
    assert (A & B) & A == A & B
    assert A & masks.KeySet([4, 9, 1, 1]) & C == A & C


def test_equal_data_share_a_slot():
    mask = (A & C) | (B & masks.KeySet([9, 4, 1])) | masks.QuerySet([1, 4, 9])
    assert len(mask.data) == 1
    assert len((C | masks.KeySet([2])).data) == 2


def test_equal_by_content_and_hashable():
    assert masks.Band(0, 1) == masks.Band(np.int64(0), 1)
    assert masks.Band(0, 1) != masks.Band(0, 2)
    assert masks.Band(0, 1) != masks.KeyRange(0, 1)
    assert masks.KeySet([1, 2]) == masks.KeySet(torch.tensor([2, 1, 2], dtype=torch.int16))
    assert masks.KeySet([1, 2]) != masks.KeySet([1, 3])
    assert masks.KeySet([1, 2]) != masks.QuerySet([1, 2])
    assert len({masks.causal(), masks.Band(None, 0), C, masks.KeySet([1, 4, 9])}) == 2
    assert masks.causal() != "causal"


def test_masks_are_frozen_and_copies_are_equal():
    with pytest.raises(AttributeError):
        A.lo = 3
    mask = masks.per_head([A | C, ~C])
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert copy.deepcopy(mask) == mask
    assert masks.from_program(copy.deepcopy(mask).program, copy.deepcopy(mask).data) == mask


def test_later_changes_of_the_callers_data_do_not_matter():
    positions = torch.tensor([1, 2, 3])
    table = np.eye(4, dtype=bool)
    sets, blocks = masks.KeySet(positions), masks.dense(table)
    before = sets.to_dense(4, 4), blocks.to_dense(4, 4)
    positions[0] = 0
    table[0] = True
    assert torch.equal(sets.to_dense(4, 4), before[0])
    assert torch.equal(blocks.to_dense(4, 4), before[1])


def test_a_changed_data_tensor_is_not_taken_for_the_old_one():
    mask = masks.KeySet([1, 2])
    changed = masks.from_program(mask.program, mask.data)
    assert changed == mask
    mask.data[0][1] = 7
    assert masks.from_program(mask.program, mask.data) == masks.KeySet([1, 7])


def test_data_are_normal_contiguous_host_tensors_in_any_mode():
    strided = torch.zeros(6, 8, dtype=torch.bool)[::2, ::2]
    with torch.inference_mode():
        mask = masks.BlockTable(strided, 4, 4) & masks.KeySet(torch.tensor([3, 1]))
    for tensor in mask.data:
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
        assert not tensor.is_inference()


def test_per_head_and_per_batch():
    heads, batches = masks.per_head([A, B, C]), masks.per_batch([A, ~A])
    mask = heads & batches
    assert (mask.num_heads, mask.batch) == (3, 2)
    assert torch.equal(dense(mask, b=1, h=2), dense(~A) & dense(C))
    nested = masks.per_batch([heads, masks.per_head([B, B, A])])
    assert (nested.num_heads, nested.batch) == (3, 2)
    assert torch.equal(dense(nested, b=1, h=2), dense(A))


def test_expressions_read_as_written():
    assert str(~(A & B) | C) == "~(Band(-5, 2) & KeyModulo(3, 0, 2)) | KeySet([1, 4, 9])"
    assert repr(masks.per_head([masks.All(), ~A])) == "per_head([All(), ~Band(-5, 2)])"
    assert str(masks.RandomBlocks(4, 2, 7)) == "RandomBlocks(4, 2, 7)"
    table = torch.ones(2, 30, 40, dtype=torch.bool)
    assert str(masks.BlockTable(table, 64, 32)) == "BlockTable(<bool [2, 30, 40]>, 64, 32)"
    assert str(masks.Segments([0, 1], [[1, 1]])) == "Segments([0, 1], <int32 [1, 2]>)"
    assert str(masks.Segments([0, 1])) == "Segments([0, 1])"
    assert str(masks.padding([3, 4])) == "KeyLengths([3, 4])"


def _deep(levels):
    mask = A
    for _ in range(levels):
        mask = ~(mask | B) & C
    return mask


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.per_head([]), "per_head got an empty list"),
        (lambda: masks.per_batch([]), "per_batch got an empty list"),
        (lambda: masks.per_head([A, None]), r"per_head\[1\] is NoneType"),
        (lambda: masks.per_head([masks.per_head([A])]), r"per_head\[0\] already differs by head"),
        (lambda: masks.per_head([A, ~masks.per_head([A]) & B]), r"per_head\[1\] already differs"),
        (
            lambda: masks.per_batch([masks.padding([3])]),
            r"per_batch\[0\] already differs by batch",
        ),
        (
            lambda: masks.per_head([A]) & masks.per_head([A, B]),
            "number of heads .* 1 in one and 2",
        ),
        (lambda: masks.padding([1]) | masks.padding([1, 2]), "batch size .* 1 in one and 2"),
        (lambda: A & 3, "a mask & int: both sides must be masks"),
        (lambda: A | torch.ones(3, dtype=torch.bool), r"masks.dense\(...\)"),
        (lambda: A and B, "no truth value"),
        (lambda: _deep(30), "at most 64"),
        (lambda: masks.per_head([A] * 4097), "joins 4097 others; at most 4096"),
    ],
)
def test_wrong_combinations_are_named(make, message):
    with pytest.raises(MaskError, match=message):
        make()
