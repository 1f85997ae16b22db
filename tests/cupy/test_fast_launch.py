"""Calls that are prepared once and repeated: with other data, on other threads, with scratch."""

import functools
import gc
import threading

import pytest
import torch

import portattn
from portattn import masks
from portattn.backends import registry, repeated
from portattn.backends.cuda_launch import Patch
from portattn.backends.cupy import fast_launch
from portattn.backends.cupy.config import ForwardSm80Config
from portattn.backends.cupy.params import layout, offset_of
from portattn.plan import plan_mask
from portattn.plan.cache import cache

CONFIG = ForwardSm80Config(64, 32, 4, 1, 1)
# Two passes, so that there are running rows; and one that cuts rows into pieces.
MASKS = [masks.sparse_transformer_strided(7), masks.longformer(16, 3)]


def query_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, 190, 32, generator=generator).half()


def prepared_calls(mask):
    plan = plan_mask(
        mask, batch=1, num_heads=2, seqlen_q=190, seqlen_k=190, q_offset=0,
        block_q=CONFIG.block_q, block_k=CONFIG.block_k,
    )  # fmt: skip
    return plan.calls


@pytest.mark.parametrize("mask", MASKS)
def test_a_repeated_call_reads_and_writes_its_own_tensors(emulated_kernels, mask):
    kernel = emulated_kernels[0]
    prepared_calls(mask).clear()
    queries = [query_of(seed) for seed in range(3)]
    outputs = [
        portattn.attention(query, query, query, mask, backend=kernel, config=CONFIG)
        for query in queries
    ]
    assert len(prepared_calls(mask)) == 1
    for query, output in zip(queries, outputs, strict=True):
        wide = query.double()
        expected = portattn.attention(wide, wide, wide, mask, backend="reference")
        assert (output.double() - expected).abs().max() < 4e-3


def test_threads_do_not_mix_their_addresses(emulated_kernels):
    kernel, mask = emulated_kernels[0], MASKS[1]
    queries = [query_of(seed) for seed in range(4)]

    def compute(query):
        return portattn.attention(query, query, query, mask, backend=kernel, config=CONFIG)

    expected = [compute(query) for query in queries]
    found = [None] * len(queries)

    def work(index):
        found[index] = compute(queries[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_another_mask_of_a_kind_is_not_prepared_anew(emulated_kernels, monkeypatch):
    kernel = emulated_kernels[0]
    ends = [[0, 70, 190], [0, 40, 190], [0, 100, 101, 190], [0, 64, 128, 190]]
    rest = masks.Band(None, 3)
    prepared = []
    run = type(registry.kernel(kernel)).run
    monkeypatch.setattr(
        type(registry.kernel(kernel)), "run",
        lambda self, *arguments: prepared.append(1) or run(self, *arguments),
    )  # fmt: skip
    for seed, boundaries in enumerate([*ends, *reversed(ends)]):
        mask, query = masks.documents(boundaries) & rest, query_of(seed)
        output = portattn.attention(query, query, query, mask, backend=kernel, config=CONFIG)
        wide = query.double()
        expected = portattn.attention(wide, wide, wide, mask, backend="reference")
        assert (output.double() - expected).abs().max() < 4e-3
    # One whose tiles lie on the grid, with ids, has launches of its own.
    assert len(prepared) == 2


def test_patches_are_at_their_fields():
    names, packing = layout()
    assert offset_of(names[0]) == 0
    assert offset_of(names[-1]) < packing.size
    patches = fast_launch.field_patches(fast_launch.FIELDS, {"piece_output": 0, "piece_lse": 64})
    assert patches[0] == Patch(0, offset_of("query"), repeated.QUERY)
    assert patches[-1] == Patch(0, offset_of("piece_lse"), repeated.SCRATCH, 64)


def test_a_plan_may_go_while_its_calls_are_remembered(emulated_kernels):
    kernel, mask = emulated_kernels[0], masks.local(5, 6)
    query = query_of(1)
    compute = functools.partial(
        portattn.attention, query, query, query, mask, backend=kernel, config=CONFIG
    )
    expected = compute()
    cache.clear()
    gc.collect()
    assert torch.equal(compute(), expected)
    assert torch.equal(compute(), expected)


def test_other_strides_and_options_are_other_calls(emulated_kernels):
    kernel, mask = emulated_kernels[0], masks.local(20, 3)
    plain = query_of(2)
    spread = torch.zeros(1, 2, 380, 48).half()[:, :, ::2, :32].copy_(plain)
    across = plain.transpose(1, 2).contiguous().transpose(1, 2)
    misaligned = torch.zeros(plain.numel() + 1).half()[1:].view(plain.shape).copy_(plain)
    for _ in range(2):
        for scale in (None, 0.5):
            found = [
                portattn.attention(
                    query, plain, plain, mask, scale=scale, backend=kernel, config=CONFIG
                )
                for query in (plain, spread, across, misaligned)
            ]
            wide = plain.double()
            expected = portattn.attention(wide, wide, wide, mask, scale=scale, backend="reference")
            for output in found:
                assert (output.double() - expected).abs().max() < 4e-3


def test_aligned_tensors_keep_their_variant_after_misaligned_ones(emulated_kernels):
    kernel = registry.kernel(emulated_kernels[0])
    plain = query_of(4)
    odd = torch.zeros(plain.numel() + 1).half()[1:].view(plain.shape).copy_(plain)
    seen = []
    for query in (odd, plain, odd, plain, plain):
        portattn.attention(query, plain, plain, backend=kernel.name, config=CONFIG)
        seen.append(kernel.variants[-1])
    assert len(set(seen)) == 2
    assert seen[1] == seen[3] == seen[4] != seen[0] == seen[2]


def test_gradients_are_not_lost_by_a_repeated_call(emulated_kernels):
    query = query_of(3)
    compute = functools.partial(
        portattn.attention, key=query, value=query, backend=emulated_kernels[0], config=CONFIG
    )
    for _ in range(3):
        expected = compute(query)
    needing = query.clone().requires_grad_()
    output = compute(needing)
    assert torch.equal(output, expected)
    assert output.requires_grad
    with torch.no_grad():
        assert torch.equal(compute(needing), expected)
    with torch.inference_mode():
        assert torch.equal(compute(query), expected)
