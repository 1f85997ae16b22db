"""The demo's last part: the whole model with portattn as its attention, in torch and in ONNX."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from portattn import export
from portattn.bench import demo_text
from portattn.integrations import transformers as integration

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

COSINE = 0.99999  # what the embeddings of two implementations must agree to
MAX_LENGTH = 512  # positions that the model knows


class Embedder(torch.nn.Module):
    """The sentence embedding of all-MiniLM-L6-v2: mean of the token vectors, normalised.

    Args:
        model: the transformers model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embeddings, float32 [batch, 384].

        Args:
            input_ids: int64 [batch, length], padded at the end.
            attention_mask: int64 [batch, length], 1 for tokens and 0 for padding.
        """
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask[..., None].to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)


def embedder(attention: str) -> tuple[Embedder, Any]:
    """The embedding module with an attention of transformers' registry, and the tokenizer."""
    model, tokenizer = demo_text.load_model(attention)
    return Embedder(model).eval(), tokenizer


def export_embedder(module: Embedder, example: dict[str, torch.Tensor], path: Path) -> None:
    """Write the module as ONNX with dynamic batch and length."""
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=MAX_LENGTH)}
    logging.getLogger("torch.onnx").setLevel(
        logging.ERROR
    )  # it misses torchvision; nothing here does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        export.to_onnx(
            module,
            (example["input_ids"], example["attention_mask"]),
            path,
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
            input_names=("input_ids", "attention_mask"),
            output_names=("sentence_embedding",),
        )


def least_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """The least cosine between rows of equal number; computed in float64."""
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1).min())


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    call()
    begin = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin


@dataclasses.dataclass(frozen=True, slots=True)
class ModelResult:
    """The whole model, run one way.

    Attributes:
        name: which way.
        seconds: for all paragraphs in one batch.
        least_cosine: between its embeddings and those with SDPA in torch.
    """

    name: str
    seconds: float
    least_cosine: float

    @property
    def agrees(self) -> bool:
        """Whether the embeddings are the same for all practical purposes."""
        return self.least_cosine >= COSINE


def run_model(folder: Path, count: int, console: Console) -> list[ModelResult]:
    """Embed paragraphs with SDPA, portattn, and portattn in ONNX Runtime; show that they agree.

    Args:
        folder: where the ONNX file goes.
        count: number of paragraphs.
        console: what to print to.

    Returns:
        The three ways with portattn, after SDPA's.
    """
    texts = demo_text.paragraphs(count)
    plain, tokenizer = embedder("sdpa")
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    integration.register()
    module, _ = embedder(integration.NAME)
    with torch.inference_mode():
        expected, plain_seconds = _timed(lambda: plain(**inputs))
        found, own_seconds = _timed(lambda: module(**inputs))
    console.print(f"{len(texts)} paragraphs, padded to {inputs['input_ids'].shape[1]} tokens")
    results = [
        ModelResult("SDPA in torch", plain_seconds, 1.0),
        ModelResult("portattn in torch", own_seconds, least_cosine(found, expected)),
    ]

    path = folder / "minilm.onnx"
    # Other sizes than it runs at; contiguous, or the strides would be written into the graph.
    example = {name: tensor[:2, :32].contiguous() for name, tensor in inputs.items()}
    export_embedder(module, example, path)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    for use_library, name in ((True, "with libportattn"), (False, "without it")):
        session = export.session(path, use_library=use_library)
        (result,), seconds = _timed(functools.partial(session.run, None, arrays))
        cosine = least_cosine(torch.from_numpy(np.asarray(result)), expected)
        results.append(ModelResult(f"ONNX Runtime {name}", seconds, cosine))
    for line in results:
        _print(console, line)
    console.print(
        f"exported to {path} ({path.stat().st_size / 2**20:.0f} MiB), batch and length dynamic"
    )
    return results


def _print(console: Console, result: ModelResult) -> None:
    verdict = "agree" if result.agrees else f"[red]below {COSINE}[/red]"
    console.print(
        f"  {result.name:<31} {result.seconds * 1e3:7.0f} ms"
        f"   least cosine with SDPA's {result.least_cosine:.7f}: {verdict}",
        highlight=False,
    )
