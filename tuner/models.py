"""The attention of well-known models, and of a transformers config.json, as problems to tune."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portattn.errors import TuningError
from portattn.tuner import cases

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portattn.tuner.cases import Case

MAX_CONFIG_BYTES = 4 << 20
# Prompt lengths of decoders, and what they hold when they decode, up to the model's own limit.
_PROMPTS = (1024, 4096, 16384)
_DECODE_BATCH, _DECODE_LENGTH = 8, 8192


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """What attention a model computes.

    Attributes:
        heads, kv_heads, head_dim, head_dim_v: of a layer; head_dim_v 0 is head_dim.
        length: the longest sequence that it was trained for.
        kind: ``"decoder"``: causal, with prompts and steps of one token; ``"encoder"``: all of
            one sequence.
        masks: of its layers, as words of `cases.parse`; "" attends to everything (before it).
        terms: features of `cases.FEATURES`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    length: int
    kind: str = "decoder"
    masks: tuple[str, ...] = ("",)
    terms: str = ""
    head_dim_v: int = 0


def _windowed(
    heads: int, kv_heads: int, head_dim: int, length: int, window: int, terms: str = ""
) -> Model:
    """A decoder whose layers have a window by turns."""
    masks = ("", f"sliding_window:{window}")
    return Model(heads, kv_heads, head_dim, length, masks=masks, terms=terms)


# From the models' published config files.
MODELS: dict[str, Model] = {
    "gpt-2": Model(12, 12, 64, 1024),
    "llama-2-7b": Model(32, 32, 128, 4096),
    "llama-2-13b": Model(40, 40, 128, 4096),
    "llama-2-70b": Model(64, 8, 128, 4096),
    "llama-3-8b": Model(32, 8, 128, 8192),
    "llama-3-70b": Model(64, 8, 128, 8192),
    "llama-3.1-8b": Model(32, 8, 128, 131072),
    "llama-3.1-70b": Model(64, 8, 128, 131072),
    "llama-3.1-405b": Model(128, 8, 128, 131072),
    "llama-3.2-1b": Model(32, 8, 64, 131072),
    "llama-3.2-3b": Model(24, 8, 128, 131072),
    "mistral-7b": Model(32, 8, 128, 32768, masks=("sliding_window:4096",)),
    "mixtral-8x7b": Model(32, 8, 128, 32768),
    "qwen2.5-0.5b": Model(14, 2, 64, 32768),
    "qwen2.5-7b": Model(28, 4, 128, 32768),
    "qwen2.5-72b": Model(64, 8, 128, 32768),
    "qwen3-8b": Model(32, 8, 128, 40960),
    "qwen3-32b": Model(64, 8, 128, 40960),
    "gemma-2-2b": _windowed(8, 4, 256, 8192, 4096, "softcap"),
    "gemma-2-9b": _windowed(16, 8, 256, 8192, 4096, "softcap"),
    "gemma-2-27b": _windowed(32, 16, 128, 8192, 4096, "softcap"),
    "gemma-3-1b": _windowed(4, 1, 256, 32768, 512),
    "gemma-3-4b": _windowed(8, 4, 256, 131072, 1024),
    "gemma-3-12b": _windowed(16, 8, 256, 131072, 1024),
    "gemma-3-27b": _windowed(32, 16, 128, 131072, 1024),
    "gpt-oss-20b": _windowed(64, 8, 64, 131072, 128, "sinks"),
    "gpt-oss-120b": _windowed(64, 8, 64, 131072, 128, "sinks"),
    "phi-3-mini": Model(32, 32, 96, 4096, masks=("sliding_window:2047",)),
    "phi-4": Model(40, 10, 128, 16384),
    "deepseek-v3": Model(128, 128, 192, 131072, head_dim_v=128),
    "bert-base": Model(12, 12, 64, 512, "encoder"),
    "bert-large": Model(16, 16, 64, 512, "encoder"),
    "all-minilm-l6": Model(12, 12, 32, 512, "encoder"),
    "longformer-base": Model(12, 12, 64, 4096, "encoder", ("longformer:512:1",)),
    "modernbert-base": Model(12, 12, 64, 8192, "encoder", ("", "local:64:64")),
    "bigbird-base": Model(12, 12, 64, 4096, "encoder", ("bigbird:64:3:3:2",)),
    "vit-b-16": Model(12, 12, 64, 197, "encoder"),
    "whisper-large": Model(20, 20, 64, 1500, "encoder"),
}


def model_cases(name: str, device: str) -> list[Case]:
    """The problems of a model.

    Args:
        name: one of `MODELS`, or the path of a config.json of the transformers library.
        device: torch device to tune on: bfloat16 on a GPU, float32 on a CPU.

    Raises:
        TuningError: there is no such model or file, or the file says too little.
    """
    model = MODELS.get(name.lower()) or _from_file(name)
    dtype = "float32" if device.startswith("cpu") else "bfloat16"
    return [cases.parse(text, device) for text in _texts(model, dtype)]


def _texts(model: Model, dtype: str) -> list[str]:
    """The problems as words."""
    heads = f"h{model.heads} kv{model.kv_heads} d{model.head_dim}"
    heads += f" dv{model.head_dim_v or model.head_dim} {dtype} {model.terms}"
    if model.kind == "encoder":
        length = min(model.length, _PROMPTS[-1])
        return [f"{heads} b{_DECODE_BATCH} s{length} {mask}" for mask in model.masks]
    lengths = sorted({min(length, model.length) for length in _PROMPTS})
    texts = [
        f"{heads} b1 s{length} {mask or 'causal'}"
        for mask in model.masks
        for length in lengths
        if not mask or length > int(mask.split(":")[1])
    ]
    held = min(_DECODE_LENGTH, model.length)
    texts += [f"{heads} b{_DECODE_BATCH} sq1 sk{held} kv_lengths {mask}" for mask in model.masks]
    return [text if "sq1" not in text else f"{text} offset:end" for text in texts]


# Names of the same thing in the configs of different architectures.
_NAMES: dict[str, tuple[str, ...]] = {
    "heads": ("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "hidden": ("hidden_size", "n_embd", "dim", "d_model"),
    "head_dim": ("head_dim", "d_kv"),
    "length": ("max_position_embeddings", "n_positions", "max_source_positions", "max_seq_len"),
    "window": ("sliding_window",),
}
_DECODERS = ("CausalLM", "LMHeadModel", "ConditionalGeneration")


def _from_file(name: str) -> Model:
    path = Path(name)
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise TuningError(f"{path} has more than {MAX_CONFIG_BYTES} bytes: no config.json")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TuningError(
            f"model is {name!r}; it must be one of {', '.join(MODELS)}, or the path of a "
            f"config.json of transformers ({error})"
        ) from error
    if not isinstance(values, dict):
        raise TuningError(f"{path} is no config.json of transformers: it holds no object")
    inner = values.get("text_config")
    return _from_config(name, {**values, **(inner if isinstance(inner, dict) else {})})


def _number(values: Mapping[str, Any], what: str, default: int | None = None) -> int | None:
    """The first of a number's names that the config has."""
    for name in _NAMES[what]:
        value = values.get(name)
        if type(value) is int and value > 0:
            return value
    return default


def _from_config(name: str, values: Mapping[str, Any]) -> Model:
    """A model from its config; what it does not say is as in most models."""
    heads = _number(values, "heads")
    hidden = _number(values, "hidden")
    if heads is None or (hidden is None and _number(values, "head_dim") is None):
        raise TuningError(
            f"model {name!r} does not say how many heads it has, or how wide they are; give its "
            'problems with --problem, e.g. "h8 s4096 d64 causal"'
        )
    kv_heads = _number(values, "kv_heads", heads) or heads
    head_dim = _number(values, "head_dim", (hidden or 0) // heads) or 1
    architectures = values.get("architectures")
    is_decoder = any(
        str(one).endswith(_DECODERS)
        for one in (architectures if isinstance(architectures, list) else ())
    )
    image, patch = values.get("image_size"), values.get("patch_size")
    length = _number(values, "length", 4096) or 4096
    if type(image) is int and type(patch) is int and patch > 0:
        length = (image // patch) ** 2 + 1
    window = _number(values, "window")
    masks: tuple[str, ...] = ("",)
    if window is not None and is_decoder and values.get("use_sliding_window", True):
        mixed = "sliding_window_pattern" in values or "layer_types" in values
        masks = ("", f"sliding_window:{window}") if mixed else (f"sliding_window:{window}",)
    return Model(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        length=length,
        kind="decoder" if is_decoder else "encoder",
        masks=masks,
        terms="softcap" if values.get("attn_logit_softcapping") else "",
    )
