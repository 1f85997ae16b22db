"""What one would use without portattn: torch's SDPA, dense or with a mask, and FlexAttention.

Each peer runs on chunks of query rows against all keys, the chunks spread over the text in a fixed
random order, until its time is used up. What is reported is what was run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from portattn.bench.demo_measure import ExactRows, extra_bytes

if TYPE_CHECKING:
    from portattn.bench.demo_patterns import Pattern
    from portattn.bench.demo_text import LayerInput

CHUNK_STARTS = 2048  # chunks begin at multiples of this
SDPA_ROWS = 256  # rows of a chunk; larger ones are no faster on a CPU
FLEX_ROWS = 2048


@dataclasses.dataclass(frozen=True, slots=True)
class PeerResult:
    """What a peer did in its time.

    Attributes:
        peer: its name.
        rows: query rows computed, all heads, against all keys.
        seconds: time inside the attention calls; masks and compiling not counted.
        setup_seconds: time to compile and to build the first chunk's mask.
        extra_bytes: memory beyond the inputs while one chunk runs, its mask included.
        error: largest absolute error against float64 on the sampled rows that were run.
    """

    peer: str
    rows: int
    seconds: float
    setup_seconds: float
    extra_bytes: int
    error: float

    @property
    def rows_per_second(self) -> float:
        """Query rows a second."""
        return self.rows / self.seconds


def chunk_starts(num_tokens: int, rows: int) -> list[int]:
    """First rows of the chunks in the order in which they run."""
    starts = list(range(0, max(num_tokens - rows, 0) + 1, max(CHUNK_STARTS, rows)))
    random.Random(0).shuffle(starts)
    return starts


def sampled_rows(num_tokens: int, count: int) -> torch.Tensor:
    """Rows to compare, int64, increasing: half in what each peer runs first, half anywhere."""
    draw = random.Random(1)
    rows = min(SDPA_ROWS, num_tokens)
    first = chunk_starts(num_tokens, min(FLEX_ROWS, num_tokens))[0]
    chosen = {*draw.sample(range(first, first + rows), min(count // 2, rows))}
    chosen |= {*draw.sample(range(num_tokens), min(count // 2, num_tokens))}
    return torch.tensor(sorted(chosen))


# One chunk: given its first row, prepare a call.
Prepare = Callable[[int], Callable[[], torch.Tensor]]


def _run(
    peer: str, starts: list[int], prepare: Prepare, exact: ExactRows, seconds: float
) -> PeerResult:
    begin = time.perf_counter()
    first = prepare(starts[0])
    output = first()  # compiles, warms up
    setup = time.perf_counter() - begin
    error = exact.error(output, starts[0])
    rows = output.shape[2]
    del output, first
    memory = extra_bytes(lambda: prepare(starts[0])())

    spent, done, begin = 0.0, 0, time.perf_counter()
    for start in starts:
        call = prepare(start)
        before = time.perf_counter()
        call()
        spent += time.perf_counter() - before
        done += rows
        if time.perf_counter() - begin > seconds:
            break
    return PeerResult(peer, done, spent, setup, memory, error)


def sdpa_dense(inputs: LayerInput, exact: ExactRows, seconds: float) -> PeerResult:
    """SDPA over all keys, no mask: what full attention costs."""
    rows = min(SDPA_ROWS, inputs.num_tokens)

    def prepare(start: int) -> Callable[[], torch.Tensor]:
        query = inputs.query[:, :, start : start + rows]
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            query, inputs.key, inputs.value
        )

    starts = chunk_starts(inputs.num_tokens, min(FLEX_ROWS, inputs.num_tokens))
    return _run("SDPA, dense", starts, prepare, exact, seconds)


def sdpa_masked(
    inputs: LayerInput, pattern: Pattern, exact: ExactRows, seconds: float
) -> PeerResult:
    """SDPA with a bool mask [rows, keys]."""
    rows = min(SDPA_ROWS, inputs.num_tokens)
    keys = np.arange(inputs.num_tokens)

    def prepare(start: int) -> Callable[[], torch.Tensor]:
        query = inputs.query[:, :, start : start + rows]
        positions = np.arange(start, start + rows)[:, None]
        kept = torch.from_numpy(pattern.mask.keeps(positions, keys, seqlen_k=inputs.num_tokens))
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            query, inputs.key, inputs.value, attn_mask=kept
        )

    starts = chunk_starts(inputs.num_tokens, min(FLEX_ROWS, inputs.num_tokens))
    return _run("SDPA, mask", starts, prepare, exact, seconds)


@contextlib.contextmanager
def _flex_settings() -> Iterator[None]:
    # Past 8 recompiles FlexAttention falls back to an unfused path without an error.
    with torch._dynamo.config.patch(recompile_limit=64), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler about itself
        yield


def flex_attention(
    inputs: LayerInput, pattern: Pattern, exact: ExactRows, seconds: float
) -> PeerResult:
    """FlexAttention of torch, compiled, with a compiled block mask."""
    from torch.nn.attention import flex_attention as flex

    rows = min(FLEX_ROWS, inputs.num_tokens)
    offset = torch.zeros((), dtype=torch.int64)
    mask_mod = pattern.flex(offset, inputs.num_tokens)

    def prepare(start: int) -> Callable[[], torch.Tensor]:
        offset.fill_(start)
        query = inputs.query[:, :, start : start + rows]
        blocks = block_mask(mask_mod, None, None, rows, inputs.num_tokens, device="cpu")
        return lambda: attend(query, inputs.key, inputs.value, block_mask=blocks)

    with _flex_settings():
        attend: Any = torch.compile(flex.flex_attention)
        block_mask: Any = torch.compile(flex.create_block_mask)
        starts = chunk_starts(inputs.num_tokens, rows)
        return _run("FlexAttention", starts, prepare, exact, seconds)
