"""Problems from text and JSON."""

import dataclasses
import json

import pytest

from portattn import masks
from portattn.errors import TuningError
from portattn.problem import AttentionProblem
from portattn.tuner import cases
from portattn.tuner import inputs as inputs_module
from portattn.tuner.inputs import edges, make, ragged, rows_of


def test_words_make_a_problem():
    case = cases.parse("b2 h8 kv2 s4096 d64 dv32 bfloat16 causal lse", "cuda:1")
    assert case.mask == masks.causal()
    assert case.problem == AttentionProblem(
        "cuda",
        "bfloat16",
        2,
        8,
        2,
        4096,
        4096,
        64,
        32,
        masks.causal().program,
        0,
        frozenset({"lse"}),
        "cuda:1",
    )


def test_what_is_left_out_has_a_default():
    assert cases.parse("h8 s16 d64").problem == AttentionProblem(
        "cpu", "float32", 1, 8, 8, 16, 16, 64, 64
    )


def test_masks_take_numbers_and_combine():
    assert cases.parse("h1 s9 d8 longformer:512:64").mask == masks.longformer(512, 64)
    assert cases.parse("h1 s9 d8 causal prefix_lm:3").mask == masks.causal() & masks.prefix_lm(3)


@pytest.mark.parametrize(
    ("offset", "expected"), [("offset:end", 90), ("offset:start", 0), ("offset:-7", -7)]
)
def test_offsets(offset, expected):
    assert cases.parse(f"h1 sq10 sk100 d8 causal {offset}").problem.q_offset == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h8 s16", "does not say head_dim"),
        ("h8 s16 d64 fp8", "the word 'fp8' is not known"),
        ("h8 kv3 s16 d64", "kv must divide h"),
        ("h0 s16 d64", "at least 1"),
        ("h1 sq1 sk9 d8 causal", "offset:end or offset:start"),
        ("h1 s9 d8 causal offset:x", "'x' is neither"),
        ("h1 s9 d8 sliding_window", "cannot be made"),
        ("h1 s9 d8 sliding_window:0", "cannot be made"),
        ("h1 s9 d8 sliding_window:a", "cannot be made"),
        ("h1 s9 d8 __import__:1", "not known"),
    ],
)
def test_a_bad_text_says_what_is_wrong_and_what_is_right(text, message):
    with pytest.raises(TuningError, match=message) as caught:
        cases.parse(text)
    assert "b1 h8 s4096 d64 float32 causal" in str(caught.value)


def test_json_holds_texts_and_masks_with_data():
    mask = masks.documents([0, 10, 64])
    entries = ["h8 s16 d64", {"problem": "h2 s64 d16 causal", "mask": json.loads(mask.to_json())}]
    first, second = cases.parse_json(json.dumps(entries))
    assert first == cases.parse("h8 s16 d64")
    assert second.mask == masks.causal() & mask
    assert second.problem.program == second.mask.program


@pytest.mark.parametrize(
    "text",
    ["{", "{}", "[1]", '[{"problem": "h8 s16 d64"}]', '[{"problem": "h1 s9 d8", "mask": {}}]'],
)
def test_bad_json_is_an_error(text):
    with pytest.raises(TuningError, match="problems file"):
        cases.parse_json(text)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_defaults_are_valid(device):
    assert {case.problem.device_type for case in cases.defaults(device)} == {device}


@pytest.mark.parametrize(
    ("text", "lengths", "offset"),
    [
        ("h1 s4096 d8 causal", (197, 197), 0),
        ("h1 sq1 sk4096 d8 offset:end", (1, 333), 332),
        ("h1 sq64 sk128 d8 causal offset:3", (63, 127), 3),
        ("h1 sq512 sk600 d8 causal offset:end", (197, 333), 136),
    ],
)
def test_ragged_problems_are_small_and_odd(text, lengths, offset):
    problem = ragged(cases.parse(text)).problem
    assert (problem.seqlen_q, problem.seqlen_k, problem.q_offset) == (*lengths, offset)


def test_inputs_have_every_feature_and_rows_keep_their_positions():
    case = cases.parse("b2 h4 kv2 sq5 sk9 d8 float16 causal offset:4 softcap alibi bias sinks lse")
    inputs = make(case, 0).inputs
    assert inputs.output.isnan().all()
    assert inputs.lse.isnan().all()
    assert inputs.bias.shape == (2, 4, 5, 9)
    assert inputs.softcap == 30
    part = rows_of(inputs, 2, 4)
    assert part.q_offset == 6
    assert part.query.shape[2] == part.lse.shape[2] == part.bias.shape[2] == 2
    lengths = make(
        dataclasses.replace(case, problem=cases.parse("b3 h1 sq2 sk9 d8 kv_lengths").problem), 0
    ).inputs.kv_lengths
    assert lengths[0] == 9
    assert ((lengths >= 4) & (lengths <= 9)).all()


def test_edge_problems_have_rows_that_attend_to_nothing_where_the_mask_allows():
    case = edges(cases.parse("h1 s4096 d8 causal"))
    assert (case.problem.seqlen_q, case.problem.q_offset) == (67, -5)
    plan = case.mask.plan(67, 67, q_offset=-5)
    assert not plan.to_dense()[..., :5, :].any()
    with_data = cases.parse_json(
        json.dumps(
            [{"problem": "h1 s64 d8", "mask": json.loads(masks.documents([0, 9, 64]).to_json())}]
        )
    )[0]
    assert edges(with_data).problem.q_offset == 0
    decode = edges(cases.parse("b3 h1 sq1 sk512 d8 kv_lengths"))
    assert decode.problem.q_offset == 0
    lengths = make(decode, 0, shortest=0).inputs.kv_lengths
    assert lengths[0] == 131
    assert 0 <= lengths.min() < 131


def test_guards_tell_what_is_written_beside_the_output():
    made = make(cases.parse("b2 h1 s7 d8 lse"), 0)
    assert not made.overwritten()
    made.inputs.output.zero_()
    made.inputs.lse.zero_()
    assert not made.overwritten()
    made.memories[1][inputs_module.GUARD_BYTES - 1] = 0
    assert made.overwritten()
