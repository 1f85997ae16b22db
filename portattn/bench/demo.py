"""The demo's measurements: sparse attention over a whole text, beside what one would use else."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import TYPE_CHECKING

import torch

from portattn import attention
from portattn.bench import demo_measure, demo_peers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from portattn.bench.demo_patterns import Pattern
    from portattn.bench.demo_peers import PeerResult
    from portattn.bench.demo_text import LayerInput

REPEATS = 3
# The longest text for which the plot runs full attention in one call: 4 s on 2 cores.
DENSE_LIMIT = 16384


@dataclasses.dataclass(frozen=True, slots=True)
class PatternResult:
    """portattn on the whole text with one mask.

    Attributes:
        pattern: the mask's name.
        density: share of the (query, key) pairs that it keeps.
        rows: query rows computed, all heads.
        first_seconds: the first call, which plans.
        seconds: median of the later calls.
        extra_bytes: memory beyond the inputs during a first call, plan and output included.
        error: largest absolute error against float64 on the sampled rows.
    """

    pattern: str
    density: float
    rows: int
    first_seconds: float
    seconds: float
    extra_bytes: int
    error: float

    @property
    def rows_per_second(self) -> float:
        """Query rows a second."""
        return self.rows / self.seconds


def run_portattn(
    inputs: LayerInput, pattern: Pattern, exact: demo_measure.ExactRows
) -> PatternResult:
    """The whole text through `portattn.attention`."""

    def call() -> torch.Tensor:
        return attention(inputs.query, inputs.key, inputs.value, pattern.mask)

    outputs: list[torch.Tensor] = []
    begin = time.perf_counter()
    memory = demo_measure.extra_bytes(lambda: outputs.append(call()))
    first = time.perf_counter() - begin
    return PatternResult(
        pattern=pattern.name,
        density=pattern.mask.density(inputs.num_tokens, inputs.num_tokens),
        rows=inputs.num_tokens,
        first_seconds=first,
        seconds=demo_measure.median_seconds(call, REPEATS),
        extra_bytes=memory,
        error=exact.error(outputs[0]),
    )


def run_dense(inputs: LayerInput, rows: torch.Tensor, seconds: float) -> PeerResult:
    """SDPA without a mask, for its seconds."""
    return demo_peers.sdpa_dense(inputs, demo_measure.exact_rows(inputs, None, rows), seconds)


def run_pattern(
    inputs: LayerInput, pattern: Pattern, rows: torch.Tensor, seconds: float
) -> tuple[PatternResult, list[PeerResult]]:
    """One mask: `portattn.attention` on the whole text, and each peer for its seconds.

    Args:
        inputs: the text.
        pattern: the mask.
        rows: int64, the rows to compare with float64.
        seconds: for each peer.
    """
    exact = demo_measure.exact_rows(inputs, pattern.mask, rows)
    own = run_portattn(inputs, pattern, exact)
    peers = [demo_peers.sdpa_masked(inputs, pattern, exact, seconds)]
    peers.append(demo_peers.flex_attention(inputs, pattern, exact, seconds))
    return own, peers


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """Measured time against length.

    Attributes:
        name: what ran.
        lengths: in tokens.
        seconds: median at each length.
    """

    name: str
    lengths: tuple[int, ...]
    seconds: tuple[float, ...]


def _curve(name: str, lengths: Sequence[int], call: Callable[[int], object]) -> Curve:
    seconds = []
    for length in lengths:
        once = functools.partial(call, length)
        once()
        seconds.append(demo_measure.median_seconds(once, 1))
    return Curve(name, tuple(lengths), tuple(seconds))


def time_against_length(inputs: LayerInput, patterns: Sequence[Pattern]) -> list[Curve]:
    """Time of one call at lengths from 1,024 to the whole text; SDPA as far as `DENSE_LIMIT`."""
    lengths = [2**n for n in range(10, 30) if 2**n < inputs.num_tokens] + [inputs.num_tokens]

    def own(pattern: Pattern, length: int) -> torch.Tensor:
        part = inputs.first(length)
        return attention(part.query, part.key, part.value, pattern.mask)

    def dense(length: int) -> torch.Tensor:
        part = inputs.first(length)
        return torch.nn.functional.scaled_dot_product_attention(part.query, part.key, part.value)

    curves = [_curve(p.name, lengths, functools.partial(own, p)) for p in patterns]
    short = [length for length in lengths if length <= DENSE_LIMIT]
    return [*curves, _curve("SDPA, dense", short, dense)]


def plot_curves(curves: Sequence[Curve], path: Path) -> None:
    """Draw measured time against length, both logarithmic, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        style = "k--o" if curve.name.startswith("SDPA") else "-o"
        axes.plot(curve.lengths, curve.seconds, style, label=curve.name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("length of the text (tokens)")
    axes.set_ylabel("time of one call (s)")
    axes.set_title("MiniLM's layer 0, 12 heads of 32, float32: measured points only")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
