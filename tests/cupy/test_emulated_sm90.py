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
CASES = [
    ("dense_short", "bfloat16"),
    ("causal", "bfloat16"),
    ("causal_negative_offset", "bfloat16"),
    ("cut_rows_causal", "bfloat16"),
    ("sinks_cut_rows", "bfloat16"),
    ("gqa_4", "bfloat16"),
    ("gqa_7", "bfloat16"),
    ("bshd_gqa", "bfloat16"),
    ("length_1", "bfloat16"),
    ("sliding_window", "bfloat16"),
    ("bigbird", "bfloat16"),
    ("longformer_positions", "bfloat16"),
    ("documents_end", "bfloat16"),
    ("documents_causal", "bfloat16"),
    ("two_segments", "bfloat16"),
    ("per_head", "bfloat16"),
    ("per_batch", "bfloat16"),
    ("empty_all", "bfloat16"),
    ("empty_piece", "bfloat16"),
    ("padding_empty", "bfloat16"),
    ("sinks_empty_rows", "bfloat16"),
    ("head_dim_odd", "bfloat16"),
    ("strided", "bfloat16"),
    ("longformer_dilated", "bfloat16"),
    ("stepped_wide", "bfloat16"),
    ("per_head_passes", "bfloat16"),
    ("empty_window_one_pass", "bfloat16"),
    ("head_dim_40", "bfloat16"),
    ("head_dim_72", "bfloat16"),
    ("head_dim_128", "bfloat16"),
    ("all_terms", "bfloat16"),
    ("scale_negative", "bfloat16"),
    ("dense_ragged", "float16"),
    ("nan_value", "float16"),
    ("strided_odd", "float16"),
    ("stepped_rows", "float16"),
    ("sinks_passes", "float16"),
    ("head_dim_256", "float16"),
]


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
