r"""Trains a small byte-level language model on the standard library's sources, twice.

Once with portattn's sparse attention and once with SDPA and the same mask as a dense tensor: same
weights, same batches; the loss curves must lie on each other. Each token sees a sliding window and
the first tokens of its sequence (Xiao et al. 2023, arXiv:2309.17453).

    python examples/train_bytes.py                          # 2 CPU cores: minutes
    python examples/train_bytes.py --device cuda --dtype bfloat16 --seqlen 16384 --window 1024 \
        --width 512 --heads 8 --layers 8 --batch 1          # SDPA's mask alone is 256 MiB there

Writes <out>.json (losses, milliseconds a step, versions) and <out>.png (the curves; matplotlib).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from portattn import attention, masks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """One experiment.

    Attributes:
        seqlen, batch, steps: tokens of a sequence, sequences of a batch, optimiser steps.
        width, heads, layers: the model's size.
        window, first: newest keys that a token sees, and first tokens that all see.
        learning_rate: the highest, after the warm-up.
        device, dtype: where, and what the model computes in (under autocast).
        seed: of weights and batches.
    """

    seqlen: int = 1024
    batch: int = 2
    steps: int = 200
    width: int = 128
    heads: int = 4
    layers: int = 4
    window: int = 128
    first: int = 16
    learning_rate: float = 3e-3
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


def sources(limit_bytes: int = 4 << 20) -> torch.Tensor:
    """The standard library's top-level modules one behind the other, uint8 [bytes]."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    return torch.frombuffer(text, dtype=torch.uint8)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; `attend` does query, key, value."""

    def __init__(self, settings: Settings, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.heads, self.attend = settings.heads, attend
        self.project = nn.Linear(settings.width, 3 * settings.width, bias=False)
        self.out = nn.Linear(settings.width, settings.width, bias=False)

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """x: [batch, seqlen, width]; angles: [seqlen, head_dim / 2]."""
        query, key, value = self.project(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key, value = (
            tensor.transpose(1, 2)
            for tensor in (rotate(query, angles), rotate(key, angles), value)
        )
        output = self.attend(query, key, value)
        result: torch.Tensor = self.out(output.transpose(1, 2).flatten(2))
        return result


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864); x: [batch, seqlen, heads, head_dim]."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, settings: Settings, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        width = settings.width
        self.embed = nn.Embedding(256, width)
        self.attentions = nn.ModuleList(
            Attention(settings, attend) for _ in range(settings.layers)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(settings.layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * settings.layers + 1))
        half = width // settings.heads // 2
        frequencies = 10000.0 ** (-torch.arange(half) / half)
        angles = torch.arange(settings.seqlen)[:, None] * frequencies
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [batch, seqlen]; logits [batch, seqlen, 256]."""
        x = self.embed(tokens)
        for index, (attend, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attend(self.norms[2 * index](x), self.angles)
            x = x + mlp(self.norms[2 * index + 1](x))
        return functional.linear(self.norms[-1](x), self.embed.weight / math.sqrt(x.shape[-1]))


def contenders(settings: Settings) -> dict[str, Callable[..., torch.Tensor]]:
    """The two ways to attend, by name."""
    mask = masks.streaming_llm(settings.first, settings.window)

    def sparse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, mask)

    dense = mask.to_dense(settings.seqlen, settings.seqlen).to(settings.device)

    def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)

    return {"portattn": sparse, "sdpa_mask": masked}


def train(settings: Settings, attend: Callable[..., torch.Tensor]) -> dict[str, list[float]]:
    """Losses, and milliseconds of each step."""
    text = sources().to(settings.device)
    torch.manual_seed(settings.seed)
    model = Model(settings, attend).to(settings.device)
    generator = torch.Generator().manual_seed(settings.seed)
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, (0.9, 0.95))
    warm_up = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: (
            min(1.0, (step + 1) / warm_up)
            * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps))
        ),
    )
    losses, times_ms = [], []
    dtype = getattr(torch, settings.dtype)
    for _ in range(settings.steps):
        start = time.perf_counter()
        begins = torch.randint(
            len(text) - settings.seqlen - 1, (settings.batch,), generator=generator
        )
        tokens = torch.stack([text[b : b + settings.seqlen + 1] for b in begins.tolist()]).long()
        with torch.autocast(settings.device, dtype, enabled=dtype != torch.float32):
            logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())  # waits for the device
        times_ms.append((time.perf_counter() - start) * 1e3)
    return {"loss": losses, "step_ms": times_ms}


def difference(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Largest difference over the first fifth of the steps, and of the means of the last fifth."""
    first, second = (torch.tensor(curve, dtype=torch.float64) for curve in curves)
    part = max(1, len(first) // 5)
    early = (first[:part] - second[:part]).abs().max()
    late = (first[-part:].mean() - second[-part:].mean()).abs()
    return float(early), float(late)


def plot(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """The loss curves, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for (name, result), style in zip(results.items(), ("-", "--"), strict=True):
        axes.plot(result["loss"], style, label=name)
    axes.set(xlabel="step", ylabel="loss (nats a byte)")
    axes.legend()
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """Train with both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default)
    parser.add_argument("--out", type=Path, default=None, help="where results go, without suffix")
    parser.add_argument("--only", choices=("portattn", "sdpa_mask"), default=None)
    given = vars(parser.parse_args(arguments))
    out, only = given.pop("out"), given.pop("only")
    settings = Settings(**given)
    results = {}
    for name, attend in contenders(settings).items():
        if only in (None, name):
            results[name] = train(settings, attend)
            step_ms = sorted(results[name]["step_ms"])[settings.steps // 2]
            losses = results[name]["loss"]
            print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {step_ms:.1f} ms a step")
    report: dict[str, object] = {"settings": dataclasses.asdict(settings), "results": results}
    report |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if len(results) == 2:
        early, late = difference([result["loss"] for result in results.values()])
        report |= {"early_difference": early, "late_difference": late}
        print(f"difference: {early:.2e} in the first fifth, {late:.2e} between the last means")
    if out is not None:
        out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        plot(results, out.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main()
