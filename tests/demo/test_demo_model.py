"""The demo's last part: the model with portattn's attention, in torch and in ONNX Runtime."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from portattn import export
from portattn.bench import demo_text
from portattn.cli import demo_model
from portattn.integrations import transformers as integration


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder after `run_model`, and what it printed."""
    folder, shown = tmp_path_factory.mktemp("model"), io.StringIO()
    results = demo_model.run_model(folder, 4, Console(file=shown, width=120))
    assert all(result.agrees for result in results)
    return folder, shown.getvalue()


def test_three_ways_agree_with_sdpa(written):
    _, shown = written
    assert shown.count("agree") == 4
    assert "below" not in shown


@pytest.mark.parametrize("use_library", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_file_runs_at_other_sizes(written, use_library, count):
    folder, _ = written
    plain, tokenizer = demo_model.embedder("sdpa")
    batch = tokenizer(demo_text.paragraphs(count), padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        expected = plain(**inputs)
    session = export.session(folder / "minilm.onnx", use_library=use_library)
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    assert (
        demo_model.least_cosine(torch.from_numpy(np.asarray(found)), expected) >= demo_model.COSINE
    )


def test_padding_does_not_change_an_embedding():
    integration.register()
    module, tokenizer = demo_model.embedder(integration.NAME)
    texts = demo_text.paragraphs(3)
    together = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        padded = module(together["input_ids"], together["attention_mask"])
        for text, embedding in zip(texts, padded, strict=True):
            alone = tokenizer([text], return_tensors="pt")
            expected = module(alone["input_ids"], alone["attention_mask"])
            assert demo_model.least_cosine(embedding[None], expected) > 1 - 1e-6
