"""What attention() does around the kernels: layouts, empties, autocast, caching, outputs."""

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

from portattn import attention, call, dispatch, explain, masks
from portattn.backends import registry
from portattn.backends.reference.forward import ReferenceConfig, ReferenceForward


class Spy(ReferenceForward):
    """The reference under another name, which keeps the inputs of its last run."""

    name = "spy"
    backend = "cpu"
    seen: ClassVar[list] = []

    def run(self, inputs, config):
        self.seen.append((inputs, config))
        super().run(inputs, config)


@pytest.fixture
def spy(monkeypatch):
    monkeypatch.setattr(
        registry, "KERNELS", {"spy": ("cpu", __name__, "Spy", ())} | registry.KERNELS
    )
    real = registry.kernel
    monkeypatch.setattr(registry, "kernel", lambda name: Spy() if name == "spy" else real(name))
    call.clear_cache()
    Spy.seen = []
    yield Spy
    call.clear_cache()


def normal(*shape, **options):
    return torch.randn(*shape, **options)


def test_bshd_is_not_copied(spy):
    query, key, value = normal(2, 7, 4, 16), normal(2, 9, 2, 16), normal(2, 9, 2, 8)
    output, lse = attention(query, key, value, layout="bshd", enable_gqa=True, return_lse=True)
    inputs, _ = spy.seen[-1]
    for given, got in (
        (query, inputs.query),
        (key, inputs.key),
        (value, inputs.value),
        (output, inputs.output),
    ):
        assert got.data_ptr() == given.data_ptr()
        assert got.shape == given.transpose(1, 2).shape
    assert output.is_contiguous()
    assert lse.shape == (2, 4, 7)
    straight = attention(
        *(tensor.transpose(1, 2).contiguous() for tensor in (query, key, value)), enable_gqa=True
    )
    assert straight.is_contiguous()
    assert torch.equal(straight, output.transpose(1, 2))


def test_what_a_kernel_gets(spy):
    query, bias = normal(2, 4, 5, 16), normal(1, 5)
    attention(
        query,
        query,
        query,
        masks.sliding_window(3),
        is_causal=True,
        softcap=3.0,
        sinks=normal(8, dtype=torch.float64)[::2],
        alibi_slopes=normal(2, 4).half(),
        bias=bias,
        kv_lengths=torch.tensor([5, 0, 4, 0])[::2],
        deterministic=True,
    )
    inputs, config = spy.seen[-1]
    assert inputs.mask == masks.sliding_window(3) & masks.causal()
    assert inputs.scale == 0.25
    assert inputs.softcap == 3.0
    assert inputs.lse is None
    assert inputs.deterministic is True
    assert inputs.bias.shape == (2, 4, 5, 5)
    assert inputs.bias.data_ptr() == bias.data_ptr()
    assert inputs.sinks.dtype == inputs.alibi_slopes.dtype == torch.float32
    assert inputs.sinks.is_contiguous()
    assert inputs.kv_lengths.is_contiguous()
    assert config == ReferenceConfig()


def test_deterministic_follows_torch(spy):
    query = normal(1, 1, 4, 8)
    attention(query, query, query)
    assert spy.seen[-1][0].deterministic is False
    torch.use_deterministic_algorithms(True)
    try:
        attention(query, query, query)
        assert spy.seen[-1][0].deterministic is True
        attention(query, query, query, deterministic=False)
        assert spy.seen[-1][0].deterministic is False
    finally:
        torch.use_deterministic_algorithms(False)


def test_config_by_fields_and_by_object(spy):
    query = normal(1, 1, 4, 8)
    attention(query, query, query, config={"dtype": "input"})
    assert spy.seen[-1][1] == ReferenceConfig("input")
    attention(query, query, query, config=ReferenceConfig("input"))
    assert spy.seen[-1][1] == ReferenceConfig("input")


@pytest.mark.parametrize("is_causal", [False, True])
def test_causal_combines_with_the_mask(is_causal):
    query = normal(1, 2, 12, 8)
    mask = masks.local(3, 2)
    both = mask & masks.causal() if is_causal else mask
    got = attention(query, query, query, mask, is_causal=is_causal, backend="reference")
    assert torch.equal(got, attention(query, query, query, both, backend="reference"))
    dense = both.to_dense(12, 12)
    torch.testing.assert_close(got, torch_sdpa(query, query, query, dense))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_sdpa(dtype):
    query, bias = normal(1, 2, 12, 8), normal(12, 12)
    with torch.autocast("cpu", dtype):
        got = attention(query, query.half(), query.bfloat16(), bias=bias, backend="reference")
        expected = torch_sdpa(query, query.half(), query.bfloat16(), bias)
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)
    with torch.autocast("cpu", dtype):
        wide = attention(*[query.double()] * 3, backend="reference")
    assert wide.dtype == torch.float64


EMPTY = {
    "batch": (0, 2, 2, 5, 7),
    "heads": (2, 0, 0, 5, 7),
    "queries": (2, 2, 2, 0, 7),
    "keys": (2, 2, 2, 5, 0),
}


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY)
def test_empty(sizes, backend):
    batch, heads, kv_heads, seqlen_q, seqlen_k = sizes
    sinks = torch.arange(heads, dtype=torch.float32)
    tensors = (
        normal(batch, heads, seqlen_q, 8),
        normal(batch, kv_heads, seqlen_k, 8),
        normal(batch, kv_heads, seqlen_k, 4),
    )
    output, lse = attention(*tensors, return_lse=True, backend=backend)
    assert torch.equal(output, torch.zeros(batch, heads, seqlen_q, 4))
    assert torch.equal(lse, torch.full((batch, heads, seqlen_q), -math.inf))
    output, lse = attention(*tensors, sinks=sinks, return_lse=True, backend=backend)
    assert torch.equal(lse, sinks[:, None].expand(batch, heads, seqlen_q))


def test_empty_gradients():
    query, key = normal(1, 2, 5, 8, requires_grad=True), normal(1, 2, 0, 8, requires_grad=True)
    sinks = torch.zeros(2, requires_grad=True)
    output, lse = attention(query, key, key, sinks=sinks, return_lse=True, backend="reference")
    (output.sum() + 2 * lse.sum()).backward()
    assert torch.equal(query.grad, torch.zeros_like(query))
    assert key.grad.shape == key.shape
    assert torch.equal(sinks.grad, torch.full((2,), 10.0))


def test_lse_of_a_float32_call():
    query = normal(1, 2, 6, 8).bfloat16()
    _, lse = attention(query, query, query, return_lse=True, backend="reference")
    assert lse.dtype == torch.float32
    scores = query.double() @ query.double().mT * 8**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())


def test_parameters_and_inference_mode():
    query = torch.nn.Parameter(normal(1, 2, 6, 8))
    with torch.inference_mode():
        got = attention(query, query, query, backend="reference")
    assert not got.requires_grad
    assert torch.equal(got, attention(*[query.detach()] * 3, backend="reference"))


def test_calls_are_remembered_and_bounded(monkeypatch):
    chosen = []
    real = dispatch.choose
    monkeypatch.setattr(
        dispatch, "choose", lambda *arguments: chosen.append(arguments) or real(*arguments)
    )
    monkeypatch.setattr(call, "_MAX_REMEMBERED", 4)
    call.clear_cache()
    for _ in range(3):
        for length in (3, 4):
            attention(*[normal(1, 1, length, 8)] * 3, backend="reference")
    assert len(chosen) == 2
    for length in range(5, 30):
        attention(*[normal(1, 1, length, 8)] * 3, backend="reference")
        assert len(call._remembered) <= 4


def test_problem_is_the_tuning_key(spy):
    query, key = normal(2, 4, 5, 16).half(), normal(2, 2, 9, 16).half()
    terms = {
        "softcap": 2.0,
        "return_lse": True,
        "is_causal": True,
        "q_offset": "end",
        "enable_gqa": True,
    }
    problem = explain(query, key, key, **terms).problem
    assert dataclasses.asdict(problem) == {
        "device_type": "cpu",
        "dtype": "float16",
        "batch": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "seqlen_q": 5,
        "seqlen_k": 9,
        "head_dim": 16,
        "head_dim_v": 16,
        "program": masks.causal().program,
        "q_offset": 4,
        "features": frozenset({"softcap", "lse"}),
        "device": "cpu",
    }
    assert problem.torch_dtype == torch.float16
