"""What the conformance suite's shapes do not reach: chunks of keys, threads, instruction sets."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from portattn import attention, call, masks
from portattn.backends.cpu import backward
from portattn.backends.cpu.backward import Tiles
from tests.strategies import mask_expressions

MASKS = {
    "dense": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(70),
    "longformer": masks.longformer(64, 5),
    "strided": masks.sparse_transformer_strided(16),
    "documents": masks.documents([0, 150, 151, 400, 700]),
    "per_head": masks.per_head([masks.causal(), masks.documents([0, 300, 700])]),
    "per_head_turned": masks.per_head([masks.documents(range(0, 701, 7)), masks.causal()]),
}


def tensors(heads, kv_heads, seqlen=700, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seqlen + heads)
    return [
        torch.randn(1, count, seqlen, 32, generator=generator, dtype=dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def gradients(inputs, mask, backend="cpu", q_offset=None, **terms):
    output, lse = attention(
        *inputs,
        mask,
        enable_gqa=True,
        return_lse=True,
        backend=backend,
        q_offset=q_offset,
        **terms,
    )
    loss = output.square().sum() + lse[lse.isfinite()].sum()
    return torch.autograd.grad(loss, [*inputs, *terms.values()])


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("name", MASKS)
def test_chunks_of_one_head(name, threads):
    inputs = tensors(2 if name.startswith("per_head") else 1, 1)
    expected = gradients(inputs, MASKS[name], "reference")
    got = gradients(inputs, MASKS[name])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    for one, other in zip(gradients(inputs, MASKS[name]), got, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_a_bias_gradient_that_heads_share(threads):
    inputs = tensors(4, 2, seqlen=300)
    for shape in ((1, 1, 300, 300), (1, 4, 1, 300), (1, 1, 300, 1)):
        bias = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        expected = gradients(inputs, MASKS["window"], "reference", bias=bias)
        got = gradients(inputs, MASKS["window"], bias=bias)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("name", ["window", "strided", "longformer"])
def test_every_instruction_set(isa, name):
    call.clear_cache()  # configs are made for one
    inputs = tensors(2, 1, seqlen=210, dtype=torch.float16)
    got = gradients(inputs, MASKS[name])
    call.clear_cache()
    expected = gradients(inputs, MASKS[name], "reference")
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=5e-3)


@hypothesis.settings(max_examples=30)
@hypothesis.given(case=mask_expressions(), seed=st.integers(0, 1000))
def test_random_masks(case, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(case.batch, heads, length, 9, generator=generator).requires_grad_()
        for heads, length in ((case.num_heads, case.seqlen_q), *((1, case.seqlen_k),) * 2)
    ]
    tiles = Tiles(32 * (1 + seed % 4), 32 * (1 + seed // 4 % 3), ("none", "auto")[seed % 2])
    expected = gradients(inputs, case.mask, "reference", q_offset=case.q_offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "default_tiles", lambda inputs: tiles)
        got = gradients(inputs, case.mask, q_offset=case.q_offset)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
