"""Repeated calls on a GPU (pytest -m gpu): addresses, streams, graphs, direct launches."""

import pytest
import torch

from portattn import attention, masks
from portattn.backends import cuda_launch, registry
from portattn.errors import UnsupportedError

pytestmark = pytest.mark.gpu
NAMES = [name for name, entry in registry.KERNELS.items() if entry[0] in ("triton", "cupy")]
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


@pytest.fixture(params=[(kernel, name) for kernel in NAMES for name in MASKS], ids="-".join)
def case(request):
    """Each GPU kernel with each mask; None where the kernel refuses it, on this device or ever."""
    kernel, name = request.param
    try:
        compute(kernel, MASKS[name], *query_of(kernel, 0))
    except UnsupportedError:
        return None
    return kernel, MASKS[name]


def test_repeated_calls_go_to_the_driver_with_their_own_addresses(case, monkeypatch):
    if case is None:
        return
    kernel, mask = case
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


def test_another_stream(case):
    if case is None:
        return
    kernel, mask = case
    pair = query_of(kernel, 1)
    expected = compute(kernel, mask, *pair)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        found = compute(kernel, mask, *pair)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_a_graph_replays(case):
    if case is None:
        return
    kernel, mask = case
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
