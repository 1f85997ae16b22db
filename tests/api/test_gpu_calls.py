"""Repeated calls on a GPU (pytest -m gpu): addresses, streams, graphs, direct launches."""

import pytest
import torch

from portattn import attention, masks
from portattn.backends import cuda_launch, registry

pytestmark = pytest.mark.gpu
_HOPPER_ONLY = ("triton_forward_hopper", "cupy_forward_sm90")
_ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
NAMES = [
    name
    for name, entry in registry.KERNELS.items()
    if entry[0] in ("triton", "cupy") and (_ON_HOPPER or name not in _HOPPER_ONLY)
]
# One pass with whole and cut rows, several passes, ids.
MASKS = {
    "dense": None,
    "longformer": masks.longformer(32, 8),
    "strided": masks.sparse_transformer_strided(24),
    "documents": masks.documents([0, 100, 700, 2000]) & masks.causal(),
}


def query_of(kernel, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = 1 if "decode" in kernel else 2000
    query = torch.randn(1, 4, rows, 128, generator=generator, device="cuda")
    key = torch.randn(1, 4, 2000, 128, generator=generator, device="cuda")
    return query.bfloat16(), key.bfloat16()


def compute(kernel, mask, query, key, backend=None):
    return attention(query, key, key, mask, q_offset="end", backend=backend or kernel)


# Decode kernels take none of the sparse ones.
CASES = [
    (kernel, name)
    for kernel in NAMES
    for name in MASKS
    if "decode" not in kernel or name == "dense"
]
each_case = pytest.mark.parametrize(("kernel", "name"), CASES)


@each_case
def test_repeated_calls_go_to_the_driver_with_their_own_addresses(kernel, name, monkeypatch):
    mask = MASKS[name]
    direct = []
    original = cuda_launch.CudaLaunch.launch

    def counted(self, grid, stream):
        direct.append(grid)
        original(self, grid, stream)

    pairs = [query_of(kernel, seed) for seed in range(3)]
    compute(kernel, mask, *pairs[0])
    monkeypatch.setattr(cuda_launch.CudaLaunch, "launch", counted)
    outputs = [compute(kernel, mask, *pair) for pair in pairs]
    assert len(direct) >= len(pairs)
    for pair, output in zip(pairs, outputs, strict=True):
        wide = [tensor.double() for tensor in pair]
        expected = compute(kernel, mask, *wide, backend="reference")
        assert (output.double() - expected).abs().max() < 0.05


@each_case
def test_another_stream(kernel, name):
    mask = MASKS[name]
    pair = query_of(kernel, 1)
    expected = compute(kernel, mask, *pair)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        found = compute(kernel, mask, *pair)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


@each_case
def test_a_graph_replays(kernel, name):
    mask = MASKS[name]
    query, key = query_of(kernel, 2)
    compute(kernel, mask, query, key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compute(kernel, mask, query, key)
    for _ in range(3):
        query.normal_()
        output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(output, compute(kernel, mask, query, key))
