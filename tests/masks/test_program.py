"""Programs and JSON: there and back, and never a crash on what cannot be trusted."""

import contextlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portattn import masks
from portattn.errors import MaskError
from tests.strategies import mask_expressions

MIN, MAX = -(2**62), 2**62


@settings(max_examples=200, deadline=None)
@given(mask_expressions(max_len=200))
def test_programs_and_json_come_back_equal(case):
    mask = case.mask
    for back in (
        masks.from_program(mask.program, mask.data),
        masks.from_program(list(mask.program), [tensor.clone() for tensor in mask.data]),
        masks.from_json(mask.to_json()),
    ):
        assert back == mask
        assert hash(back) == hash(mask)
        assert back.program == mask.program
        assert str(back) == str(mask)
        for name in ("batch", "num_heads", "depth", "depends_on_query"):
            assert getattr(back, name) == getattr(mask, name)
        for ours, theirs in zip(back.data, mask.data, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("mask", "program"),
    [
        (masks.All(), (1, 0)),
        (masks.Band(-3, 4), (1, 1, -3, 4)),
        (masks.Band(None, 0), (1, 1, MIN, 0)),
        (masks.KeyRange(2, None), (1, 2, 2, MAX)),
        (masks.QueryRange(None, None), (1, 3, MIN, MAX)),
        (masks.KeyModulo(5, 1, 2), (1, 4, 5, 1, 2)),
        (masks.DiffModulo(5, 1, 2), (1, 5, 5, 1, 2)),
        (masks.BlockBand(8, None, 1), (1, 6, 8, MIN, 1)),
        (masks.KeySet([3]), (1, 7, 0)),
        (masks.QuerySet([3]), (1, 8, 0)),
        (masks.RandomBlocks(8, 2, 2**63 - 1), (1, 9, 8, 2, 2**63 - 1)),
        (masks.BlockTable([[True]], 8, 4), (1, 10, 0, 8, 4)),
        (masks.Segments([1], [2]), (1, 11, 0, 1)),
        (masks.Segments([1]), (1, 11, 0, 0)),
        (masks.KeyLengths([4]), (1, 12, 0)),
        (masks.causal() & ~masks.KeySet([3]), (1, 13, 2, 1, MIN, 0, 15, 7, 0)),
        (masks.KeySet([3]) | masks.KeySet([4]), (1, 14, 2, 7, 0, 7, 1)),
        (masks.per_head([masks.All(), masks.causal()]), (1, 16, 2, 0, 1, MIN, 0)),
        (masks.per_batch([masks.All()]), (1, 17, 1, 0)),
        (masks.Documents([0, 3, 9]), (1, 18, 0)),
    ],
    ids=lambda value: str(value) if isinstance(value, masks.Mask) else "",
)
def test_programs_are_those_of_the_format(mask, program):
    assert mask.program == program
    assert masks.from_program(program, mask.data) == mask


def test_programs_that_are_not_simplified_are_simplified():
    assert masks.from_program([1, 13, 1, 15, 15, 1, 0, 1]) == masks.Band(0, 1)
    assert masks.from_program([1, 14, 2, 2, 0, 1, 0]) == masks.All()


def test_a_program_without_data_is_read_once():
    mask = masks.longformer(64, 2)
    assert masks.from_program(mask.program) is masks.from_program(list(mask.program))


def test_the_masks_own_data_are_not_copied():
    mask = masks.longformer(64, [2, 70])
    assert masks.from_program(mask.program, mask.data).data[0] is mask.data[0]


ONE = torch.tensor([1])


@pytest.mark.parametrize(
    ("program", "data", "message"),
    [
        ([], (), "has 0 values"),
        ([1], (), "has 1 values"),
        (None, (), "NoneType"),
        ([2, 0], (), "version 2"),
        ([1, 19], (), "unknown opcode 19 at 1"),
        ([1, -1], (), "opcode"),
        ([1, 0.0], (), "must be an integer"),
        ([1, True], (), "not a bool"),
        ([1, "1", 0, 1], (), "must be an integer"),
        ([1, 1, 0], (), "ends at 3"),
        ([1, 0, 0], (), "ends at 2, but has 3"),
        ([1, 1, 4, 3], (), "program at 1: Band has lower bound 4"),
        ([1, 1, MAX, MAX], (), "must be in"),
        ([1, 1, MIN, MIN], (), "must be in"),
        ([1, 1, 0, 2**70], (), "must be in"),
        ([1, 4, 0, 0, 0], (), "modulus m is 0"),
        ([1, 13, 0], (), "number of operands"),
        ([1, 13, 2**40, 0], (), "number of operands"),
        ([1, 13, 2, 0], (), "ends at 4"),
        ([1, 13, 4097, *[0] * 4097], (), "at most 4096"),
        ([1] * 70_000, (), "has 70000 values"),
        ([1, 16, 1, 16, 1, 0], (), "already differs by head"),
        ([1, *[15] * 100, 0], (), "nests deeper"),
        ([1, *[13, 1] * 100, 0], (), "nests deeper"),
        ([1, 7, 0], (), "names slot 0, but data has 0"),
        ([1, 7, -1], (ONE,), "names slot -1"),
        ([1, 7, 0], (ONE.int(),), "needs a tensor of torch.int64"),
        ([1, 7, 0], ([1],), "data\\[0\\] is list"),
        ([1, 7, 0], (ONE, ONE), "data\\[1\\] is named by no slot"),
        ([1, 7, 0], (torch.tensor([2, 1]),), "unsorted or repeated"),
        ([1, 7, 0], (torch.tensor([1, 1]),), "unsorted or repeated"),
        ([1, 7, 0], (torch.tensor([[1]]),), "1 dimensions"),
        ([1, 7, 0], (torch.tensor([-1]),), "hold -1"),
        ([1, 7, 0], (torch.empty(1, dtype=torch.int64, device="meta"),), "meta"),
        ([1, 10, 0, 0, 1], (torch.ones(1, 1, dtype=torch.bool),), "block_q is 0"),
        ([1, 11, 0, 0], (torch.tensor(1, dtype=torch.int32),), "1 or 2 dimensions"),
        ([1, 12, 0], (torch.tensor([-1]),), ">= 0"),
    ],
)
def test_malformed_programs_are_named(program, data, message):
    with pytest.raises(MaskError, match=message):
        masks.from_program(program, data)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-1, 20) | st.integers(-(2**64), 2**64), max_size=14),
    st.lists(st.sampled_from(["int32", "int64", "bool"]), max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_noise_is_a_mask_or_a_mask_error(tail, dtypes, seed):
    rng = np.random.default_rng(seed)
    shapes = [(3,), (2, 3), (0,), (1, 2, 2), (2, 1, 3, 3), ()]
    data = [
        torch.from_numpy(np.array(rng.integers(-1, 3, shapes[rng.integers(6)]))).to(
            getattr(torch, dtype)
        )
        for dtype in dtypes
    ]
    with contextlib.suppress(MaskError):
        mask = masks.from_program([1, *tail], data)
        assert masks.from_program(mask.program, mask.data) == mask


RECORD = {"format": "portattn.mask", "version": 1, "program": [1, 7, 0]}
POSITIONS = {"dtype": "int64", "shape": [2], "values": [3, 5]}


def test_json_is_as_documented():
    assert json.loads(masks.KeySet([5, 3]).to_json()) == RECORD | {"data": [POSITIONS]}
    big = masks.KeySet(range(0, 300, 3)) & masks.dense(np.tri(20, 20, dtype=bool))
    tensors = json.loads(big.to_json())["data"]
    assert all("base64" in tensor and "values" not in tensor for tensor in tensors)
    assert masks.from_json(big.to_json().encode()) == big


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (b"\xff", "cannot be read"),
        ("[]", "is no mask"),
        ({"format": "x"}, "is no mask"),
        (RECORD | {"version": 2, "data": []}, "version 2"),
        (RECORD | {"data": None}, '"data"'),
        (RECORD | {"program": [1.0, 0]}, '"program"'),
        (RECORD | {"program": {}}, '"program"'),
        (RECORD | {"data": [3]}, "needs a dtype"),
        (RECORD | {"data": [POSITIONS | {"dtype": "float32"}]}, "needs a dtype"),
        (RECORD | {"data": [POSITIONS | {"dtype": []}]}, "needs a dtype"),
        (RECORD | {"data": [POSITIONS | {"shape": [3]}]}, "needs 3 integers"),
        (RECORD | {"data": [POSITIONS | {"shape": [-2]}]}, "list of at most 4 sizes"),
        (RECORD | {"data": [POSITIONS | {"shape": [1, 1, 1, 1, 2]}]}, "list of at most 4 sizes"),
        (RECORD | {"data": [POSITIONS | {"shape": [2**39, 2**39]}]}, "are read"),
        (RECORD | {"data": [POSITIONS | {"values": [3, 2**63]}]}, "integers in"),
        (RECORD | {"data": [POSITIONS | {"values": [3, "5"]}]}, "integers in"),
        (RECORD | {"data": [POSITIONS | {"base64": "AA=="}]}, "needs either"),
        (
            RECORD | {"data": [{"dtype": "int64", "shape": [2], "base64": "AA=="}]},
            "1 bytes; .* need 16",
        ),
        (RECORD | {"data": [{"dtype": "int64", "shape": [2], "base64": "A!"}]}, "broken base64"),
        (RECORD | {"data": [{"dtype": "int64", "shape": [2]}]}, "needs either"),
        (RECORD | {"data": []}, "names slot 0"),
        (RECORD | {"data": [POSITIONS | {"values": [5, 3]}]}, "unsorted"),
    ],
)
def test_malformed_json_is_named(record, message):
    text = json.dumps(record) if isinstance(record, dict) else record
    with pytest.raises(MaskError, match=message):
        masks.from_json(text)


def test_json_is_bounded_in_size():
    text = masks.KeySet(range(100)).to_json()
    with pytest.raises(MaskError, match="max_bytes"):
        masks.from_json(text, max_bytes=100)
    with pytest.raises(MaskError, match="str or bytes"):
        masks.from_json(None)
