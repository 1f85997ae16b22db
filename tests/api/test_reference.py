"""The law itself, against loops over rows written from the formula, and its gradients."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

from portattn import attention, masks
from portattn.backends.reference import blocks
from portattn.masks import Band

INF = math.inf


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def by_hand(query, key, value, keeps, *, scale, softcap, slopes, bias, sinks, offset):
    """Row by row, key by key, in Python floats."""
    batch, heads, seqlen_q, _ = query.shape
    seqlen_k, group = key.shape[2], heads // key.shape[1]
    output = np.zeros((batch, heads, seqlen_q, value.shape[3]))
    lse = np.full((batch, heads, seqlen_q), -INF)
    for b, h, r in np.ndindex(batch, heads, seqlen_q):
        i = offset + r
        scores = {}
        for j in range(seqlen_k):
            if not keeps(i, j):
                continue
            score = scale * float(query[b, h, r] @ key[b, h // group, j])
            score = softcap * math.tanh(score / softcap) - slopes[b, h] * abs(i - j)
            scores[j] = score + float(bias[h, r, j])
        total = math.exp(sinks[h]) + sum(math.exp(score) for score in scores.values())
        lse[b, h, r] = math.log(total)
        for j, score in scores.items():
            output[b, h, r] += math.exp(score) / total * value[b, h // group, j].numpy()
    return output, lse


def test_formula():
    query, key, value = (
        torch.randn(2, heads, n, d, dtype=torch.float64)
        for heads, n, d in ((4, 5, 3), (2, 7, 3), (2, 7, 2))
    )
    slopes, bias, sinks = (
        torch.rand(2, 4),
        torch.randn(4, 5, 7, dtype=torch.float64),
        torch.randn(4),
    )
    bias[:, 2, 3] = -INF
    output, lse = attention(
        query,
        key,
        value,
        Band(-2, 1),
        q_offset=1,
        enable_gqa=True,
        scale=-0.6,
        softcap=1.5,
        alibi_slopes=slopes,
        bias=bias,
        sinks=sinks,
        return_lse=True,
        backend="reference",
    )
    expected, expected_lse = by_hand(
        query,
        key,
        value,
        lambda i, j: -2 <= j - i <= 1,
        scale=-0.6,
        softcap=1.5,
        slopes=slopes.tolist() and slopes.double().numpy(),
        bias=bias,
        sinks=sinks.double().tolist(),
        offset=1,
    )
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=1e-12, atol=1e-12)


def test_sinks_scale_the_row_without_them():
    query = torch.randn(1, 3, 6, 4, dtype=torch.float64)
    sinks = torch.randn(3, dtype=torch.float64)
    plain, plain_lse = attention(
        query, query, query, is_causal=True, return_lse=True, backend="reference"
    )
    output, lse = attention(
        query, query, query, is_causal=True, sinks=sinks, return_lse=True, backend="reference"
    )
    expected = plain * torch.sigmoid(plain_lse - sinks[:, None])[..., None]
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        lse,
        torch.logaddexp(plain_lse, sinks[:, None].expand_as(plain_lse)),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_gradients(layout):
    tensors = [double(2, 4, 5, 3), double(2, 2, 7, 3), double(2, 2, 7, 2)]
    if layout == "bshd":
        tensors = [
            tensor.detach().transpose(1, 2).contiguous().requires_grad_() for tensor in tensors
        ]

    def call(query, key, value, bias, sinks, slopes):
        return attention(
            query,
            key,
            value,
            Band(-3, 0) | masks.KeyRange(0, 1),
            q_offset="end",
            enable_gqa=True,
            softcap=2.0,
            bias=bias,
            sinks=sinks,
            alibi_slopes=slopes,
            return_lse=True,
            layout=layout,
            backend="reference",
        )

    assert torch.autograd.gradcheck(call, (*tensors, double(4, 1, 7), double(4), double(2, 4)))


def test_gradients_with_kv_lengths():
    lengths = torch.tensor([5, 2])

    def call(query, key, value, slopes):
        return attention(
            query,
            key,
            value,
            kv_lengths=lengths,
            is_causal=True,
            alibi_slopes=slopes,
            backend="reference",
        )

    tensors = (double(2, 2, 3, 3), double(2, 2, 7, 3), double(2, 2, 7, 3), double(2))
    assert torch.autograd.gradcheck(call, tensors)


def test_some_gradients_only():
    query, key, value = double(1, 2, 5, 3), double(1, 2, 5, 3).detach(), double(1, 2, 5, 3)
    attention(query, key, value, is_causal=True, backend="reference").sum().backward()
    assert query.grad is not None
    assert value.grad is not None
    assert key.grad is None


def test_empty_rows_have_zero_gradients():
    query, key, value = (double(1, 1, 6, 4) for _ in range(3))
    output, lse = attention(
        query, key, value, masks.QueryRange(0, 3), return_lse=True, backend="reference"
    )
    assert torch.equal(output[0, 0, 3:], torch.zeros(3, 4, dtype=torch.float64))
    assert torch.equal(lse[0, 0, 3:], torch.full((3,), -INF, dtype=torch.float64))
    (output.sum() + lse[0, 0, :3].sum()).backward()
    assert torch.equal(query.grad[0, 0, 3:], torch.zeros(3, 4, dtype=torch.float64))
    for tensor in (query, key, value):
        assert tensor.grad.isfinite().all()


def test_bias_of_minus_infinity_has_finite_gradients():
    query, bias = double(1, 1, 4, 3), torch.zeros(4, 4, dtype=torch.float64)
    bias[1], bias[2, :2] = -INF, -INF
    bias.requires_grad_()
    attention(query, query, query, bias=bias, backend="reference").square().sum().backward()
    assert query.grad.isfinite().all()
    assert torch.equal(bias.grad[1], torch.zeros(4, dtype=torch.float64))


def test_blocks_of_rows_change_nothing(monkeypatch):
    tensors = [double(2, 2, 9, 3) for _ in range(3)]
    bias = double(1, 9, 9)

    def call():
        output = attention(*tensors, Band(-4, 0), bias=bias, backend="reference")
        return output, torch.autograd.grad(output.square().sum(), [*tensors, bias])

    whole = call()
    monkeypatch.setattr(blocks, "MAX_SCORES", 2 * 9 * 2)  # two rows a block
    torch.testing.assert_close(call(), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_agrees_with_sdpa(dtype):
    query, key, value = (torch.randn(2, 3, 33, 16) for _ in range(3))
    got = attention(
        query.to(dtype), key.to(dtype), value.to(dtype), is_causal=True, backend="reference"
    )
    expected = torch_sdpa(
        query.to(dtype).double(), key.to(dtype).double(), value.to(dtype).double(), is_causal=True
    )
    assert got.dtype == dtype
    assert torch.equal(got, expected.to(dtype))


def test_keys_past_kv_lengths_reach_nothing():
    query, key = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 8, 4)
    lengths = torch.tensor([5, 8], dtype=torch.int32)
    output = attention(query, key, key, kv_lengths=lengths, is_causal=True, backend="reference")
    alone = attention(
        query[:1],
        key[:1, :, :5],
        key[:1, :, :5],
        is_causal=True,
        q_offset="end",
        backend="reference",
    )
    torch.testing.assert_close(output[:1], alone)
    key[0, :, 5:] = math.nan
    assert torch.equal(
        attention(query, key, key, kv_lengths=lengths, is_causal=True, backend="reference"), output
    )


def test_nan_reaches_the_rows_that_attend_to_it():
    query = torch.randn(1, 1, 6, 4)
    key = query.clone()
    key[0, 0, 3, 1] = math.nan
    output = attention(query, key, query, is_causal=True, backend="reference")
    assert output[0, 0, 3:].isnan().all()
