"""The decode kernel in the emulator against float64, its hazards and its closed variants."""

import dataclasses
import shutil

import pytest
import torch

import portattn
from portattn import masks
from portattn.backends import registry
from portattn.backends.base import AttentionInputs
from portattn.backends.cupy.config_decode import DecodeConfig
from portattn.backends.cupy.loader import SOURCE_DIR
from portattn.conformance import check
from portattn.conformance.cases import Case
from portattn.conformance.suite import outcome
from tests.cupy.emulated import EARLY, LATE
from tests.cupy.emulated_decode import EmulatedDecode

NAMES = ("cupy_decode_emulated", "cupy_decode_emulated_reversed")

# Cases of the suite that the kernel takes. Each (dtype, head dims, rows, terms) is compiled once.
SUITE = [
    ("decode", "bfloat16"),
    ("decode_gqa", "bfloat16"),
    ("few_queries", "bfloat16"),
    ("kv_lengths_causal", "bfloat16"),
    ("kv_lengths_empty", "bfloat16"),
    ("kv_lengths_decode", "bfloat16"),
    ("kv_lengths_window", "bfloat16"),
    ("kv_lengths_fewer_than_queries", "bfloat16"),
    ("sinks_cut_rows", "bfloat16"),
    ("sinks_decode", "bfloat16"),
    ("empty_piece", "bfloat16"),
    ("mqa_decode_7", "bfloat16"),
    ("nan_key_decode", "bfloat16"),
    ("beyond_keys", "bfloat16"),
    ("length_1", "bfloat16"),
    ("padded_decode", "float16"),
    ("kv_lengths_alibi_sinks", "float16"),
    ("alibi_decode", "float16"),
    ("decode_value_wider", "float16"),
]


@pytest.fixture(autouse=True)
def emulated_decode(monkeypatch):
    """Both stand in the registry; as backend "cpu", since the tensors are on the CPU."""
    for name, kind in zip(NAMES, ("EmulatedDecode", "ReversedDecode"), strict=True):
        entry = ("cpu", "tests.cupy.emulated_decode", kind, ())
        monkeypatch.setitem(registry.KERNELS, name, entry)


@pytest.mark.parametrize(("case", "dtype"), SUITE)
def test_case_of_the_suite(case, dtype):
    result = check(NAMES[SUITE.index((case, dtype)) % 2], case, dtype)
    assert result.status == "pass", result


def _ragged(name, **fields):
    """Batch elements, heads and rows in numbers that no tile divides."""
    return Case(name, **{"batch": 4, "head_dim": 64, "head_dim_v": 64, "seqlen_k": 333, **fields})


LENGTHS = (0, 1, 333, 129)
RAGGED = [
    (_ragged("gqa_1", kv_lengths=LENGTHS, seqlen_q=1, num_heads=16, num_kv_heads=16), "bfloat16"),
    (_ragged("gqa_4", kv_lengths=LENGTHS, seqlen_q=1, num_heads=16, num_kv_heads=4), "bfloat16"),
    (_ragged("gqa_7", kv_lengths=LENGTHS, seqlen_q=2, num_heads=7, num_kv_heads=1), "bfloat16"),
    (_ragged("gqa_8", kv_lengths=LENGTHS, seqlen_q=5, num_heads=8, num_kv_heads=1), "bfloat16"),
    (
        _ragged(
            "several_row_blocks",
            kv_lengths=LENGTHS,
            seqlen_q=70,
            num_heads=8,
            num_kv_heads=2,
            is_causal=True,
        ),
        "bfloat16",
    ),
    (
        _ragged(
            "window_of_several_rows",
            kv_lengths=LENGTHS,
            seqlen_q=9,
            num_heads=4,
            mask=lambda: masks.sliding_window(33) & masks.KeyRange(7, 300),
        ),
        "bfloat16",
    ),
    (
        _ragged("longer_than_keys", kv_lengths=(400, 333, 340, 2), seqlen_q=3, is_causal=True),
        "bfloat16",
    ),
    (
        _ragged(
            "all_terms",
            kv_lengths=LENGTHS,
            seqlen_q=3,
            num_heads=8,
            softcap=4.0,
            alibi="bh",
            bias="bhqk",
            bias_cut="some",
            sinks=True,
            is_causal=True,
            scale=-0.7,
        ),
        "bfloat16",
    ),
    (
        _ragged(
            "empty_rows_with_sinks",
            kv_lengths=LENGTHS,
            seqlen_q=4,
            sinks=True,
            mask=lambda: masks.Band(-40, -3),
        ),
        "bfloat16",
    ),
    (_ragged("strided", kv_lengths=LENGTHS, seqlen_q=1, num_heads=8, memory="bshd"), "bfloat16"),
    (_ragged("scale_0", kv_lengths=LENGTHS, seqlen_q=1, scale=0.0, num_heads=8), "bfloat16"),
    (
        _ragged(
            "odd_unaligned",
            kv_lengths=LENGTHS,
            seqlen_q=2,
            head_dim=33,
            head_dim_v=45,
            memory="padded",
        ),
        "float16",
    ),
    (
        Case("many_splits", seqlen_q=1, seqlen_k=5000, num_heads=4, num_kv_heads=1, batch=1),
        "bfloat16",
    ),
    (
        _ragged(
            "head_dim_256",
            kv_lengths=LENGTHS,
            seqlen_q=1,
            head_dim=256,
            head_dim_v=256,
            num_heads=8,
        ),
        "bfloat16",
    ),
]


@pytest.mark.parametrize(
    ("case", "dtype"), RAGGED, ids=lambda value: getattr(value, "name", value)
)
def test_ragged_lengths(case, dtype):
    for name in NAMES:
        result = outcome(name, case, dtype)
        assert result.status == "pass", result


def _inputs(lengths=LENGTHS, num_kv_heads=2, seqlen_q=1, seqlen_k=333, kind=torch.int32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    batch = len(lengths)
    query = normal(batch, 4 * num_kv_heads, seqlen_q, 64)
    return AttentionInputs(
        query=query,
        key=normal(batch, num_kv_heads, seqlen_k, 64),
        value=normal(batch, num_kv_heads, seqlen_k, 64),
        output=torch.full_like(query, torch.nan),
        lse=torch.full(query.shape[:3], torch.nan),
        mask=None,
        q_offset=0,
        kv_lengths=torch.tensor(lengths, dtype=kind),
        scale=0.125,
        softcap=0.0,
        alibi_slopes=None,
        bias=None,
        sinks=None,
        deterministic=False,
    )


def _run(kernel, inputs, config):
    fresh = dataclasses.replace(
        inputs, output=torch.full_like(inputs.output, torch.nan), lse=inputs.lse.clone()
    )
    kernel.run(fresh, config)
    return fresh.output, fresh.lse


@pytest.mark.parametrize("num_sms", [1, 3, 40])
def test_any_number_of_blocks_gives_the_same(num_sms):
    """Shares begin and end inside rows of work, at their ends, and past the last strip."""
    inputs = _inputs(lengths=(333, 0, 64, 16, 333, 1, 0, 200))
    kernel = EmulatedDecode()
    kernel.num_sms = 1
    expected = _run(kernel, inputs, DecodeConfig(16, 4, 2, 1, 8))
    kernel.num_sms = num_sms
    output, lse = _run(kernel, inputs, DecodeConfig(16, 4, 2, 1, 1))
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output, expected[0], atol=2e-2, rtol=2e-2)
    assert kernel.launches[-1][1] == num_sms


@pytest.mark.parametrize("config", [(32, 4, 3, 1, 1), (64, 8, 2, 1, 1), (16, 8, 6, 1, 2)])
def test_configs_agree(config):
    inputs = _inputs()
    kernel = EmulatedDecode()
    kernel.order = LATE
    expected = _run(kernel, inputs, DecodeConfig(16, 4, 2, 1, 1))
    output, lse = _run(kernel, inputs, DecodeConfig(*config))
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output, expected[0], atol=2e-2, rtol=2e-2)


def test_more_sequences_than_threads():
    """Each thread then adds up several sequences."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 40, (300,), generator=generator)
    inputs = _inputs(tuple(lengths.tolist()), num_kv_heads=1, seqlen_k=40, kind=torch.int64)
    output, lse = _run(EmulatedDecode(), inputs, DecodeConfig(16, 4, 2, 1, 1))
    wide = [t.double() for t in (inputs.query, inputs.key, inputs.value)]
    expected, expected_lse = portattn.attention(
        *wide, enable_gqa=True, kv_lengths=lengths, return_lse=True, backend="reference"
    )
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=2e-2)


FAULTS = [
    # (order in which the fault shows, queries, file, what is deleted, what stays in its place)
    (LATE, 1, "decode.cu", "        cp_async_wait<kNumStages - 2>();\n", ""),
    (
        LATE,
        9,  # times 4 heads: several warps share a strip
        "decode.cu",
        "        group_barrier();  // the strip has come; every warp of the group has left the "
        "one before\n",
        "",
    ),
    (
        EARLY,
        2,  # rows of two rounds
        "decode_merge.cuh",
        "        block_barrier();  // every warp has computed the row, and read what was staged "
        "before\n",
        "        if (round == 0) block_barrier();\n",
    ),
    (
        EARLY,
        1,
        "decode_merge.cuh",
        "        block_barrier();\n        store_staged",
        "        store_staged",
    ),
]


@pytest.mark.parametrize(("order", "seqlen_q", "file", "deleted", "kept"), FAULTS)
def test_the_emulator_sees_a_missing_wait(tmp_path, order, seqlen_q, file, deleted, kept):
    """Else a pass of the tests above would say nothing about the order of copies and reads."""
    shutil.copytree(SOURCE_DIR, tmp_path / "cuda")
    source = tmp_path / "cuda" / file
    text = source.read_text()
    assert text.count(deleted) == 1
    source.write_text(text.replace(deleted, kept))
    config = DecodeConfig(16, 4, 2, 1, 1)
    kernel = EmulatedDecode()
    inputs = _inputs(seqlen_q=seqlen_q)
    expected, _ = _run(kernel, inputs, config)
    broken = EmulatedDecode()
    broken.order, broken.sources = order, tmp_path / "cuda"
    try:
        output, _ = _run(broken, inputs, config)
    except AssertionError:  # the emulator itself says it
        return
    assert not torch.equal(output, expected)


def test_lengths_and_masks_do_not_compile_nor_prepare():
    kernel = EmulatedDecode()
    config = DecodeConfig(16, 4, 2, 1, 1)
    for lengths in ((0, 1, 333, 129), (5, 0, 0, 0), (333, 333, 333, 333)):
        _run(kernel, _inputs(lengths), config)
    assert len(kernel._calls) == 1
    _run(kernel, dataclasses.replace(_inputs(), mask=masks.sliding_window(9)), config)
    _run(kernel, _inputs(seqlen_k=200), config)
    assert len({variant for variant, _ in kernel.launches}) == 1
