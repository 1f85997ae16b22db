"""The SDPA-shaped call, against torch's own."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

from portattn import errors, masks
from portattn.integrations.sdpa import scaled_dot_product_attention

LEADING = {3: (), 4: (2,), 5: (2, 3)}


def tensors(ndim):
    leading = LEADING[ndim]
    return (
        torch.randn(*leading, 4, 20, 16),
        torch.randn(*leading, 4, 30, 16),
        torch.randn(*leading, 4, 30, 8),
    )


def kept(*shape):
    return torch.rand(*shape) < 0.5


OPTIONS = {
    "plain": lambda leading: {},
    "causal": lambda leading: {"is_causal": True},
    "scale": lambda leading: {"scale": 0.2},
    "bool": lambda leading: {"attn_mask": kept(20, 30)},
    "bool_keys": lambda leading: {"attn_mask": kept(1, 30)},
    "bool_heads": lambda leading: {"attn_mask": kept(4, 20, 30)},
    "bool_full": lambda leading: {"attn_mask": kept(*leading, 4, 20, 30)},
    "float": lambda leading: {"attn_mask": torch.randn(20, 30)},
    "float_full": lambda leading: {"attn_mask": torch.randn(*leading, 4, 20, 30)},
}


@pytest.mark.parametrize("ndim", LEADING)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_agrees_with_torch(ndim, options):
    query, key, value = tensors(ndim)
    arguments = options(LEADING[ndim])
    got = scaled_dot_product_attention(query, key, value, **arguments)
    expected = torch_sdpa(query, key, value, **arguments)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected)


def test_fully_masked_rows_and_gqa():
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    got = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    expected = torch_sdpa(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(got, expected)
    assert torch.equal(got[0, :, 2], torch.zeros(4, 8))
    with pytest.raises(errors.ShapeError, match="enable_gqa"):
        scaled_dot_product_attention(query, key, value)


def test_portattn_masks_are_taken():
    query = torch.randn(1, 2, 20, 8)
    window = masks.sliding_window(4)
    got = scaled_dot_product_attention(query, query, query, window)
    expected = torch_sdpa(query, query, query, window.to_dense(20, 20))
    torch.testing.assert_close(got, expected)


def test_traced_bool_masks():
    torch._dynamo.reset()
    query, mask = torch.randn(1, 2, 20, 8), kept(20, 20)
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="eager")
    with torch.no_grad():
        got = compiled(query, query, query, mask)
    torch.testing.assert_close(got, torch_sdpa(query, query, query, mask))


def test_what_is_refused():
    query = torch.randn(1, 2, 5, 8)
    with pytest.raises(errors.UnsupportedError, match=r"dropout_p is 0.1; .*pass dropout_p=0.0"):
        scaled_dot_product_attention(query, query, query, dropout_p=0.1)
    with pytest.raises(
        errors.MaskError, match=r"is_causal is True beside attn_mask; .*combine with &"
    ):
        scaled_dot_product_attention(query, query, query, kept(5, 5), is_causal=True)
    with pytest.raises(
        errors.ShapeError, match=r"attn_mask has shape \[4, 5\]; .*\[1, 2, 5, 5\]: insert"
    ):
        scaled_dot_product_attention(query, query, query, kept(4, 5))
    with pytest.raises(errors.ShapeError, match=r"query has shape \[5, 8\]; .*add dimensions"):
        scaled_dot_product_attention(query[0, 0], query, query)
