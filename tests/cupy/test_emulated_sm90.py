"""The sm_90a kernel in the emulator: cases, configs, what one block leaves to the next, hazards.

All conformance cases in both dtypes take minutes here; on a GPU `portattn verify --backend cupy`
runs them.
"""

import dataclasses
import shutil

import pytest
import torch

import portattn
from portattn import masks
from portattn.backends import registry
from portattn.backends.base import AttentionInputs
from portattn.backends.cupy.config_sm90 import ForwardSm90Config, stage_apart
from portattn.backends.cupy.loader import SOURCE_DIR
from portattn.conformance import check
from tests.cupy.emulated_sm90 import FORWARD, REVERSED, EmulatedForwardSm90

# (case, dtype): each dtype has few compiled variants, which take most of the time.
BFLOAT16 = [
    "dense_short", "causal", "causal_negative_offset", "cut_rows_causal", "sinks_cut_rows",
    "gqa_4", "gqa_7", "bshd_gqa", "length_1", "sliding_window", "bigbird",
    "longformer_positions", "documents_end", "documents_causal", "two_segments", "per_head",
    "per_batch", "empty_all", "empty_piece", "padding_empty", "sinks_empty_rows",
    "head_dim_odd", "strided", "longformer_dilated", "stepped_wide", "per_head_passes",
    "empty_window_one_pass", "head_dim_40", "head_dim_72", "head_dim_128", "all_terms",
    "scale_negative",
]  # fmt: skip
FLOAT16 = [
    "dense_ragged", "nan_value", "strided_odd", "stepped_rows", "sinks_passes", "head_dim_256",
]  # fmt: skip
CASES = [*((case, "bfloat16") for case in BFLOAT16), *((case, "float16") for case in FLOAT16)]


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_case(emulated_sm90, case, dtype):
    # The orders take turns: over the list each sees each dtype.
    kernel = emulated_sm90[CASES.index((case, dtype)) % 3]
    assert check(kernel, case, dtype).status == "pass"


def _tensors(dtype, head_dim, head_dim_v, seqlen=333, seqlen_k=None, heads=(4, 2)):
    generator = torch.Generator().manual_seed(0)

    def normal(count, rows, dim):
        return torch.randn(1, count, rows, dim, generator=generator).to(dtype)

    keys = seqlen if seqlen_k is None else seqlen_k
    query = normal(heads[0], seqlen, head_dim)
    return query, normal(heads[1], keys, head_dim), normal(heads[1], keys, head_dim_v)


def _call(backend, tensors, **options):
    return portattn.attention(
        *tensors, enable_gqa=True, backend=backend, return_lse=True, **options
    )


def _check(kernel, tensors, mask, config=None, **options):
    options["mask"] = mask
    wide = [tensor.double() for tensor in tensors]
    expected, expected_lse = _call("reference", wide, **options)
    eager, _ = _call("reference", tensors, config={"dtype": "input"}, **options)
    allowed = 2 * (eager.double() - expected).abs().max()
    allowed += 2 * torch.finfo(tensors[0].dtype).eps * expected.abs().max()
    output, lse = _call(kernel, tensors, config=config, **options)
    assert (output.double() - expected).abs().max() <= allowed
    # Scores are float32 whatever the inputs are.
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


CONFIG = ForwardSm90Config
MASK = masks.sliding_window(150) | masks.KeyRange(0, 3)
# Distinct steps in one pass, one of them no divisor of the length.
STEPPED = masks.local(20, 20) | masks.KeyModulo(7, 0, 1) | masks.KeyModulo(3, 1, 2)


@pytest.mark.parametrize(
    ("config", "dtype", "head_dims", "mask"),
    [
        (
            CONFIG(consumers=1, block_k=64, num_stages=4, blocks_per_sm=2),
            "float16",
            (64, 64),
            MASK,
        ),
        (CONFIG(consumers=2, block_k=176, num_stages=2), "bfloat16", (128, 128), MASK),
        (
            CONFIG(consumers=2, block_k=80, num_stages=3, ping_pong=True, persistent=False),
            "bfloat16",
            (96, 32),
            STEPPED,
        ),
        (
            CONFIG(consumers=3, block_k=112, num_stages=3, ping_pong=True),
            "float16",
            (64, 64),
            STEPPED,
        ),
    ],
)
def test_configs_agree_with_the_reference(emulated_sm90, config, dtype, head_dims, mask):
    for kernel in emulated_sm90[1:]:
        tensors = _tensors(getattr(torch, dtype), *head_dims, 270)
        _check(kernel, tensors, mask, config=config)


@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 129, 191, 333])
def test_lengths(emulated_sm90, seqlen):
    kernel = emulated_sm90[seqlen % 3]
    _check(kernel, _tensors(torch.bfloat16, 64, 64, seqlen), masks.causal())
    tensors = _tensors(torch.bfloat16, 64, 64, seqlen, 200)
    _check(kernel, tensors, masks.local(40, 70), q_offset="end")


@pytest.mark.parametrize("workers", [1, 2, 100])
def test_workers(emulated_sm90, workers, monkeypatch):
    """A block that does everything, and more blocks than work; rows cut into pieces."""
    monkeypatch.setattr(EmulatedForwardSm90, "workers", workers)
    config = CONFIG(consumers=3, num_stages=2, ping_pong=True, min_piece=1)
    for kernel in emulated_sm90:
        _check(kernel, _tensors(torch.bfloat16, 64, 64, 70, 900), None, config=config)


def test_rows_without_keys_that_are_stored_over_the_query(emulated_sm90, monkeypatch):
    """An item without tiles stores zeros where the next item's query must not have come yet."""
    config = CONFIG(consumers=2, num_stages=3, ping_pong=True, head_group=1)
    assert not stage_apart(128, 128, config)
    monkeypatch.setattr(EmulatedForwardSm90, "workers", 1)
    mask = masks.per_head([masks.causal(), ~masks.All(), masks.KeyRange(0, 9), masks.All()])
    # 124 columns: not stored directly.
    for kernel in (*emulated_sm90[:2], *[emulated_sm90[2]] * 5):
        _check(kernel, _tensors(torch.bfloat16, 128, 124, 150), mask, config=config)


@pytest.mark.parametrize(
    ("config", "head_dim"),
    [
        (CONFIG(consumers=2, block_k=64, num_stages=2, ping_pong=True), 256),
        (CONFIG(consumers=3, num_stages=3), 64),
    ],
)
def test_works_of_few_tiles(emulated_sm90, config, head_dim, monkeypatch):
    """The last V of a work comes after the next one's first K; works may have no or one tile."""
    config = dataclasses.replace(config, head_group=1)
    few = masks.KeyRange(0, 9) & masks.QueryRange(130, 200)
    mask = masks.per_head([masks.causal(), few, masks.sliding_window(40), masks.All()])
    for workers, kernel in zip((1, 2, 1), emulated_sm90, strict=True):
        monkeypatch.setattr(EmulatedForwardSm90, "workers", workers)
        _check(kernel, _tensors(torch.bfloat16, head_dim, head_dim, 300), mask, config=config)


def test_documents_within_a_warp(emulated_sm90):
    """Id tiles whose 16 rows have many ids, and ids that the other side does not have."""
    tensors = _tensors(torch.bfloat16, 64, 64, 270)
    ends = torch.tensor([0, 1, 2, 3, 5, 8, 13, 21, 64, 65, 150, 150, 190, 270])
    plan = masks.documents(ends).plan(270, 270, block=(192, 128))
    assert (plan.tiles[:, 2] != plan.tiles[:, 3]).any()
    _check(emulated_sm90[0], tensors, masks.documents(ends))
    ids = torch.arange(270, dtype=torch.int32) // 3
    mask = masks.Segments(ids, ids.flip(0)) | masks.sliding_window(5)
    _check(emulated_sm90[1], tensors, mask)


@pytest.mark.parametrize(("head_dim_v", "min_piece"), [(64, 8), (60, 1)])
def test_rows_behind_a_tile_are_another_tile_s(emulated_sm90, head_dim_v, min_piece, monkeypatch):
    """Tiles begin with the documents: stores, staged or not, and merges end with their rows."""
    config = CONFIG(1, 64, blocks_per_sm=3, min_piece=min_piece)
    documents = masks.documents(torch.tensor([0, 70, 250]))
    plan = documents.plan(250, 250, block=(config.block_q, config.block_k))
    assert (plan.rows[:, 0] % config.block_q != 0).any()
    tensors = _tensors(torch.bfloat16, 64, head_dim_v, 250)
    for workers, kernel in zip((100, 1, 7), emulated_sm90, strict=True):
        monkeypatch.setattr(EmulatedForwardSm90, "workers", workers)
        _check(kernel, tensors, documents, config=config)
        _check(kernel, tensors, documents & masks.causal(), config=config)


@pytest.mark.parametrize("scale", [1e-38, 1e-6, 30.0])
def test_any_scale(emulated_sm90, scale):
    """Rows' ceilings are in units of the scores: what lies above them is divided by the scale."""
    tensors = _tensors(torch.float16, 64, 64, 200)
    _check(emulated_sm90[0], tensors, None, scale=scale)


def test_lengths_masks_and_offsets_do_not_compile(emulated_sm90):
    kernel = registry.kernel(emulated_sm90[0])
    kernel.variants.clear()
    config = CONFIG(consumers=3, num_stages=2, ping_pong=True)
    for seqlen, mask in ((5, None), (70, masks.causal()), (33, masks.sliding_window(7))):
        tensors = _tensors(torch.bfloat16, 64, 64, seqlen)
        _call(emulated_sm90[0], tensors, mask=mask, config=config)
    # Nor are the order and the number of blocks a compile-time matter.
    for other in ({"head_group": 16}, {"persistent": False}, {"min_piece": 1}):
        tensors = _tensors(torch.bfloat16, 64, 64, 9)
        _call(emulated_sm90[0], tensors, config=dataclasses.replace(config, **other))
    assert len(kernel.variants) == 6
    assert len(set(kernel.variants)) == 1


FAULTS = [
    # (order in which it shows, file, lines that are deleted, what the emulator says or "")
    (REVERSED, "forward_sm90.cu", "consumer.wait_value(before);", "more arrivals"),
    (FORWARD, "forward_sm90.cu", "wgmma_wait<1>();", ""),
    (FORWARD, "hopper.cuh", "named_barrier_sync(free_barrier(", "deadlock"),
    (FORWARD, "forward_sm90.cu", "async_proxy_fence();", "no async_proxy_fence"),
]


def _error(kernel, inputs, config):
    """What the emulator said, or ""."""
    try:
        kernel.run(inputs, config)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("order", "file", "deleted", "message"), FAULTS)
def test_the_emulator_sees_a_missing_wait(tmp_path, order, file, deleted, message):
    """Else a pass of the tests above would say nothing about the order of copies and reads."""
    shutil.copytree(SOURCE_DIR, tmp_path / "cuda")
    source = tmp_path / "cuda" / file
    lines = source.read_text().splitlines()
    kept = [line for line in lines if deleted not in line]
    assert len(kept) < len(lines)
    source.write_text("\n".join(kept))
    # 124 columns: not stored directly, and O goes over Q.
    query, key, value = _tensors(torch.bfloat16, 128, 124, 400)
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=value,
        output=torch.empty(1, 4, 400, 124, dtype=torch.bfloat16),
        lse=None,
        mask=masks.causal(),
        q_offset=0,
        kv_lengths=None,
        scale=0.125,
        softcap=0.0,
        alibi_slopes=None,
        bias=None,
        sinks=None,
        deterministic=False,
    )
    config = CONFIG(consumers=2, num_stages=3, ping_pong=True)
    assert not stage_apart(128, 128, config)
    outputs, errors = [], []
    for sources in (SOURCE_DIR, tmp_path / "cuda"):
        kernel = EmulatedForwardSm90()
        kernel.order, kernel.sources = order, sources
        outputs.append(torch.zeros_like(inputs.output))
        errors.append(_error(kernel, dataclasses.replace(inputs, output=outputs[-1]), config))
    assert not errors[0]
    assert message in errors[1]
    assert bool(message) == bool(errors[1])
    assert message or not torch.equal(*outputs)


def test_inputs_that_cannot_be_read_in_place_are_copied_at_every_call():
    """Also after a call of equal sizes and strides that could, into an unaligned output."""
    kernel = EmulatedForwardSm90()
    query, key, value = _tensors(torch.bfloat16, 64, 64, 130)
    shifted = torch.empty(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape).copy_(query)
    outputs = []
    for given in (query, shifted, query):
        output = torch.empty(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape)
        kernel.run(
            AttentionInputs(
                query=given, key=key, value=value, output=output, lse=None, mask=None,
                q_offset=0, kv_lengths=None, scale=0.125, softcap=0.0, alibi_slopes=None,
                bias=None, sinks=None, deterministic=False,
            ),
            CONFIG(),
        )  # fmt: skip
        outputs.append(output.clone())
    assert shifted.data_ptr() % 16 != 0
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
