"""portattn as an attention of transformers, against its own attentions."""

import types

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from portattn import errors
from portattn.integrations import transformers as integration

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
DECODER = {
    **SIZES,
    "num_key_value_heads": 2,
    "sliding_window": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def registered():
    transformers.logging.set_verbosity_error()
    integration.register()
    integration.register()


def outputs(model, padding, other):
    """Both attentions' results at tokens that are no padding."""
    tokens = torch.randint(3, 90, (2, 40))
    mask = torch.ones(2, 40, dtype=torch.long)
    if padding:
        mask[1, -13:] = 0
    results = []
    for implementation in (other, "portattn"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(tokens, attention_mask=mask)[0][mask.bool()])
    return results


MODELS = {
    "bert": lambda: (BertModel(BertConfig(**SIZES)), "sdpa"),
    "mistral": lambda: (MistralForCausalLM(MistralConfig(**DECODER)), "sdpa"),
    "gemma2": lambda: (
        Gemma2ForCausalLM(Gemma2Config(**DECODER, head_dim=16, attn_logit_softcapping=2.0)),
        "eager",
    ),
}


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_agree(make, padding):
    model, other = make()
    got, expected = outputs(model.eval(), padding, other)[::-1]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_generation_agrees():
    model = MistralForCausalLM(MistralConfig(**DECODER)).eval()
    tokens = torch.randint(3, 90, (2, 9))
    results = []
    for implementation in ("sdpa", "portattn"):
        model.set_attn_implementation(implementation)
        results.append(
            model.generate(
                tokens, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(tokens)
            )
        )
    assert torch.equal(*results)


def test_padding_is_not_expanded_over_queries():
    mask = torch.ones(2, 9, dtype=torch.long)
    assert (
        integration.attention_mask(2, 9, 9, attention_mask=mask, allow_is_bidirectional_skip=True)
        is None
    )
    mask[1, 5:] = 0
    made = integration.attention_mask(
        2, 9, 9, attention_mask=mask, allow_is_bidirectional_skip=True
    )
    assert torch.equal(made, mask.bool()[:, None, None, :])


def test_sinks_and_position_bias():
    query, bias = torch.randn(2, 4, 7, 16), torch.randn(1, 4, 7, 7)
    module = types.SimpleNamespace(is_causal=False)
    keep = torch.rand(2, 1, 7, 7) < 0.7
    got, weights = integration.attention_forward(
        module, query, query, query, keep, position_bias=bias, scaling=0.3, s_aux=torch.zeros(4)
    )
    scores = (0.3 * query @ query.mT + bias).masked_fill(~keep, -torch.inf)
    scores = torch.cat([scores, torch.zeros(2, 4, 7, 1)], -1)
    expected = scores.softmax(-1)[..., :-1] @ query
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert weights is None
    assert got.is_contiguous()


def test_what_is_refused():
    query, module = torch.randn(1, 2, 5, 8), types.SimpleNamespace()
    with pytest.raises(errors.UnsupportedError, match=r"dropout is 0.1; .*model.eval\(\)"):
        integration.attention_forward(module, query, query, query, None, dropout=0.1)
    with pytest.raises(errors.UnsupportedError, match=r"cache is a dict; paged caches .*sdpa"):
        integration.attention_forward(module, query, query, query, None, cache={})
