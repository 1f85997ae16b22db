"""Configs, hazards and closed variants of the kernel, in the emulator."""

import dataclasses
import shutil

import pytest
import torch

import portattn
from portattn import masks
from portattn.backends import registry
from portattn.backends.base import AttentionInputs
from portattn.backends.cupy.config import ForwardSm80Config
from portattn.backends.cupy.loader import SOURCE_DIR
from tests.cupy.emulated import EARLY, LATE, EmulatedForwardSm80

MASK = masks.sliding_window(150) | masks.KeyRange(0, 3)


def _tensors(dtype, head_dim, head_dim_v, seqlen=190):
    generator = torch.Generator().manual_seed(0)

    def normal(heads, dim):
        return torch.randn(1, heads, seqlen, dim, generator=generator).to(dtype)

    return normal(2, head_dim), normal(1, head_dim), normal(1, head_dim_v)


def _call(backend, tensors, **options):
    return portattn.attention(
        *tensors, enable_gqa=True, backend=backend, return_lse=True, **options
    )


@pytest.mark.parametrize(
    ("config", "dtype", "head_dim", "head_dim_v"),
    [
        (ForwardSm80Config(64, 32, 4, 1, 1), torch.float16, 64, 64),
        (ForwardSm80Config(64, 32, 4, 3, 1), torch.bfloat16, 32, 96),
        (ForwardSm80Config(128, 32, 4, 2, 1), torch.float16, 96, 32),
        (ForwardSm80Config(128, 64, 4, 1, 1), torch.bfloat16, 128, 128),
        (ForwardSm80Config(128, 32, 8, 1, 1), torch.float16, 256, 256),
        (ForwardSm80Config(128, 128, 8, 1, 1), torch.bfloat16, 64, 64),
        (ForwardSm80Config(64, 16, 4, 1, 1), torch.float32, 32, 64),
        (ForwardSm80Config(128, 32, 8, 2, 1), torch.float32, 64, 32),
    ],
)
def test_configs_agree_with_the_reference(emulated_kernels, config, dtype, head_dim, head_dim_v):
    _assert_agrees(emulated_kernels, config, _tensors(dtype, head_dim, head_dim_v))


def test_maxima_that_grow_from_tile_to_tile(emulated_kernels):
    """By less and by more than a row's base may lag behind."""
    query, key, value = _tensors(torch.float16, 64, 64)
    growth = torch.linspace(0.1, 12, key.shape[2])[:, None]
    config = ForwardSm80Config(64, 32, 4, 1, 1)
    _assert_agrees(emulated_kernels, config, [query, (key * growth).half(), value])


def _assert_agrees(kernels, config, tensors):
    wide = [tensor.double() for tensor in tensors]
    expected, expected_lse = _call("reference", wide, mask=MASK)
    eager, _ = _call("reference", tensors, mask=MASK, config={"dtype": "input"})
    allowed = 2 * (eager.double() - expected).abs().max()
    allowed += 2 * torch.finfo(tensors[0].dtype).eps * expected.abs().max()
    for kernel in kernels:
        output, lse = _call(kernel, tensors, mask=MASK, config=config)
        assert (output.double() - expected).abs().max() <= allowed
        # Scores are float32 whatever the inputs are.
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


FAULTS = [
    # (stages, order in which the fault shows, the barrier that is deleted from forward_sm80.cu)
    (2, LATE, "        block_barrier();  // it has come; every warp has left tile index - 1\n"),
    (3, EARLY, "        block_barrier();  // it has come; every warp has left tile index - 1\n"),
    (1, LATE, "        block_barrier();  // K has come; every warp has left V\n"),
    (1, EARLY, "        block_barrier();  // V has come; every warp has left K\n"),
]


@pytest.mark.parametrize(("stages", "order", "deleted"), FAULTS)
def test_the_emulator_sees_a_missing_barrier(tmp_path, stages, order, deleted):
    """Else a pass of the tests above would say nothing about the order of copies and reads."""
    shutil.copytree(SOURCE_DIR, tmp_path / "cuda")
    source = tmp_path / "cuda" / "forward_sm80.cu"
    text = source.read_text()
    assert text.count(deleted) == 1
    source.write_text(text.replace(deleted, ""))
    query, key, value = _tensors(torch.float16, 64, 64)
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=value,
        output=torch.empty_like(query),
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
    config = ForwardSm80Config(64, 32, 4, stages, 1)
    results = []
    for sources in (SOURCE_DIR, tmp_path / "cuda"):
        kernel = EmulatedForwardSm80()
        kernel.order, kernel.sources = order, sources
        output = torch.empty_like(query)
        kernel.run(dataclasses.replace(inputs, output=output), config)
        results.append(output)
    assert not torch.equal(*results)


def test_lengths_masks_and_offsets_do_not_compile(emulated_kernels):
    kernel = registry.kernel("cupy_emulated")
    kernel.variants.clear()
    config = ForwardSm80Config(64, 32, 4, 1, 1)
    for seqlen, mask in ((5, None), (70, masks.causal()), (33, masks.sliding_window(7))):
        _call("cupy_emulated", _tensors(torch.float16, 64, 64, seqlen), mask=mask, config=config)
    # The order of heads is no compile-time matter either.
    other = dataclasses.replace(config, head_group=16)
    _call("cupy_emulated", _tensors(torch.float16, 64, 64, 9), config=other)
    assert len(kernel.variants) == 4
    assert len(set(kernel.variants)) == 1
