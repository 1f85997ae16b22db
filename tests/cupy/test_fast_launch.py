"""Calls that are prepared once and repeated: with other data, on other threads, with scratch."""

import threading

import pytest
import torch

import portattn
from portattn import masks
from portattn.backends.cupy import fast_launch
from portattn.backends.cupy.config import ForwardSm80Config
from portattn.backends.cupy.params import layout, offset_of
from portattn.plan import plan_mask

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


def test_fields_that_are_written_together_lie_together():
    names, packing = layout()
    assert offset_of(names[0]) == 0
    assert offset_of(names[-1]) < packing.size
    for group in (fast_launch._TENSORS, fast_launch._SCRATCH):
        assert fast_launch._group_offset(group) == offset_of(group[0])
    with pytest.raises(ValueError, match="in this order, together"):
        fast_launch._group_offset(("query", "value"))
