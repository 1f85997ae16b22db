"""Repeated calls on a GPU (pytest -m gpu): addresses, streams, graphs, direct launches."""

import pytest
import torch

from portattn import attention, masks
from portattn.backends import cuda_launch, registry, repeated
from portattn.errors import UnsupportedError

pytestmark = pytest.mark.gpu
_HOPPER_ONLY = ("triton_forward_hopper", "cupy_forward_sm90")
_ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
NAMES = [
    name
    for name, entry in registry.KERNELS.items()
    if entry[0] in ("triton", "cupy")
    and "backward" not in name
    and (_ON_HOPPER or name not in _HOPPER_ONLY)
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


def assert_right(kernel, mask, query, key, output):
    expected = compute(kernel, mask, query.double(), key.double(), backend="reference")
    assert (output.double() - expected).abs().max() < 0.05


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
    direct, repeated_calls = [], []
    launched, again = cuda_launch.Launches.run, repeated.RepeatedCall.again

    def counted(self, addresses, stream):
        direct.append(addresses)
        launched(self, addresses, stream)

    def counted_again(self, *arguments):
        repeated_calls.append(again(self, *arguments))
        return repeated_calls[-1]

    pairs = [query_of(kernel, seed) for seed in range(3)]
    for _ in range(2):
        compute(kernel, mask, *pairs[0])
    monkeypatch.setattr(cuda_launch.Launches, "run", counted)
    monkeypatch.setattr(repeated.RepeatedCall, "again", counted_again)
    outputs = [compute(kernel, mask, *pair) for pair in pairs]
    assert len(direct) == len(pairs)
    assert repeated_calls == [True] * len(pairs)
    for pair, output in zip(pairs, outputs, strict=True):
        assert_right(kernel, mask, *pair, output)


@pytest.mark.parametrize("kernel", [name for name in NAMES if "decode" not in name])
def test_other_documents_take_over_the_launch(kernel, monkeypatch):
    prepared, run = [], type(registry.kernel(kernel)).run

    def counted(self, inputs, config):
        prepared.append(inputs.mask)
        return run(self, inputs, config)

    monkeypatch.setattr(type(registry.kernel(kernel)), "run", counted)
    # Short enough that no row is cut, and longer than a tile.
    for seed, first in enumerate((90, 200, 333, 480, 300)):
        bounds = [0, first, *range(first + 480, 1999, 480), 2000]
        mask = masks.documents(bounds) & masks.causal()
        pair = query_of(kernel, seed)
        assert_right(kernel, mask, *pair, compute(kernel, mask, *pair))
    assert len(prepared) == 1


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


@each_case
def test_a_graph_captured_on_a_stream_that_was_used_before(kernel, name):
    mask = MASKS[name]
    query, key = query_of(kernel, 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            compute(kernel, mask, query, key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = compute(kernel, mask, query, key)
    query.normal_()
    output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert_right(kernel, mask, query, key, output)


@each_case
def test_other_strides_addresses_and_masks_after_a_repeated_call(kernel, name):
    mask = MASKS[name]
    query, key = query_of(kernel, 4)
    across = key.transpose(1, 2).contiguous().transpose(1, 2)
    misaligned = torch.empty(key.numel() + 1, dtype=key.dtype, device="cuda")[1:]
    misaligned = misaligned.view(key.shape).copy_(key)
    for _ in range(3):
        for keys in (key, across, misaligned):
            assert_right(kernel, mask, query, key, compute(kernel, mask, query, keys))
        if "decode" not in kernel:
            window = masks.local(50, 20)
            assert_right(kernel, window, query, key, compute(kernel, window, query, key))


@pytest.mark.parametrize("kernel", NAMES)
def test_gradients_are_refused_after_a_repeated_call(kernel):
    query, key = query_of(kernel, 5)
    for _ in range(3):
        expected = compute(kernel, None, query, key)
    needing = query.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="requires grad"):
        compute(kernel, None, needing, key)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(compute(kernel, None, needing, key), expected)


@pytest.mark.parametrize("kernel", [name for name in NAMES if "decode" in name])
def test_lengths_change_between_repeated_calls(kernel):
    query, key = query_of(kernel, 6)
    for length in (5, 700, 2000, 1):
        lengths = torch.tensor([length], device="cuda")
        found = attention(query, key, key, kv_lengths=lengths, backend=kernel)
        rows = key[:, :, :length]
        assert_right(kernel, None, query, rows, found)
