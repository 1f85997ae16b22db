"""What `portattn bench` measures: one attention problem per row, in named sets."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

from portattn.bench.patterns import Pattern
from portattn.errors import ConfigError

TOKENS, WIDTH = 16384, 2048  # batch * seqlen and num_heads * head_dim of the forward cells
_SIZE = re.compile(r"(sq|sk|kv|b|h|s|d)(\d{1,9})")
FULL = Pattern("full")
_DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """One row of the benchmark.

    Attributes:
        preset: the set it is from.
        batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim: sizes.
        pattern: what may attend.
        lengths: ``"none"``, or KV lengths per sequence: ``"full"``: all of seqlen_k, ``"random"``:
            drawn from 1 to seqlen_k.
        dtype: of query, key and value.
        metric: ``"time"``, ``"bandwidth"`` (decode: bytes a second) or ``"host"`` (host time of a
            call).
        beside_dense: portattn's kernels run the same sizes without a mask as well, in turn.
    """

    preset: str
    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    pattern: Pattern = FULL
    lengths: str = "none"
    dtype: str = "bfloat16"
    metric: str = "time"
    beside_dense: bool = False

    @property
    def name(self) -> str:
        """The row's name, unique in a file of results."""
        heads = f"h{self.num_heads}"
        if self.num_kv_heads != self.num_heads:
            heads += f" kv{self.num_kv_heads}"
        same = self.seqlen_q == self.seqlen_k
        sizes = f"s{self.seqlen_q}" if same else f"sq{self.seqlen_q} sk{self.seqlen_k}"
        words = f"b{self.batch} {heads} {sizes} d{self.head_dim} {self.dtype} {self.pattern.text}"
        lengths = "" if self.lengths == "none" else f" lengths:{self.lengths}"
        return f"{self.preset}: {words}{lengths}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of query, key and value."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def kv_lengths(self) -> torch.Tensor | None:
        """int32 [batch] on the CPU, or None."""
        if self.lengths == "none":
            return None
        if self.lengths == "full":
            return torch.full((self.batch,), self.seqlen_k, dtype=torch.int32)
        draw = torch.Generator().manual_seed(0)
        return torch.randint(
            1, self.seqlen_k + 1, (self.batch,), generator=draw, dtype=torch.int32
        )

    def kept_pairs(self) -> int:
        """(query, key) pairs that are kept, all batches and heads together."""
        lengths = self.kv_lengths()
        if lengths is not None:
            return int(lengths.sum()) * self.seqlen_q * self.num_heads
        pairs = self.batch * self.num_heads * self.seqlen_q * self.seqlen_k
        if self.pattern.kind == "causal" and self.seqlen_q == self.seqlen_k:
            return self.batch * self.num_heads * self.seqlen_q * (self.seqlen_q + 1) // 2
        mask = self.pattern.mask(self.seqlen_k)
        return pairs if mask is None else round(pairs * mask.density(self.seqlen_q, self.seqlen_k))

    def kv_bytes(self) -> int:
        """Bytes of the keys and values that exist."""
        lengths = self.kv_lengths()
        keys = self.batch * self.seqlen_k if lengths is None else int(lengths.sum())
        return 2 * keys * self.num_kv_heads * self.head_dim * self.torch_dtype.itemsize

    def total_bytes(self) -> int:
        """Query, key, value and output, each moved once."""
        rows = self.batch * self.num_heads * self.seqlen_q
        return self.kv_bytes() + 2 * rows * self.head_dim * self.torch_dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, the pattern as text."""
        values = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(type(self))
        }
        return values | {"pattern": self.pattern.text}


def _forward() -> list[Workload]:
    """Dense and causal; the cells that matter most first."""
    return [
        Workload(
            "forward", TOKENS // seqlen, WIDTH // dim, WIDTH // dim, seqlen, seqlen, dim,
            Pattern(kind),
        )
        for seqlen in (16384, 4096, 1024)
        for dim in (128, 64, 256)
        for kind in ("causal", "full")
    ]  # fmt: skip


def _one(preset: str, seqlen: int, pattern: Pattern, *, beside_dense: bool = False) -> Workload:
    """Batch 1, 16 heads of 128."""
    return Workload(preset, 1, 16, 16, seqlen, seqlen, 128, pattern, beside_dense=beside_dense)


def _sparse() -> list[Workload]:
    window = Pattern("sliding_window", (1024,))
    longformer = Pattern("longformer", (512, 64))
    bigbird = Pattern("bigbird", (64, 3, 3, 2))
    local = Pattern("local_strided", (128,))
    strided = Pattern("sparse_transformer_strided", (128,))
    rows = [(16384, longformer), (16384, bigbird), (16384, window), (16384, strided)]
    rows += [(65536, one) for one in (strided, local, longformer, bigbird, window)]
    return [_one("sparse", seqlen, pattern) for seqlen, pattern in (*rows, (16384, local))]


def _blocks() -> list[Workload]:
    return [_one("blocks", 16384, Pattern("random_blocks", (128, 16)), beside_dense=True)]


def _documents() -> list[Workload]:
    kinds = ("causal_documents", "documents")
    return [_one("documents", 65536, Pattern(kind, (16,))) for kind in kinds]


def _decode() -> list[Workload]:
    sizes = [(16, 8192), (1, 131072), (64, 8192), (128, 4096)]
    return [
        Workload(
            "decode", batch, 32, 8, 1, seqlen, 128, lengths=lengths, metric="bandwidth"
        )
        for lengths in ("full", "random")
        for batch, seqlen in sizes
        if batch > 1 or lengths == "full"
    ]  # fmt: skip


def _host() -> list[Workload]:
    return [
        Workload("host", 1, 8, 8, 128, 128, 64, Pattern("full"), metric="host"),
        Workload("host", 1, 8, 8, 128, 128, 64, Pattern("causal"), metric="host"),
        Workload("host", 1, 8, 8, 128, 128, 64, Pattern("sliding_window", (64,)), metric="host"),
        Workload("host", 1, 8, 2, 1, 128, 64, lengths="full", metric="host"),
    ]


_PRESETS = {
    "forward": _forward,
    "sparse": _sparse,
    "blocks": _blocks,
    "documents": _documents,
    "decode": _decode,
    "host": _host,
}
PRESETS = tuple(_PRESETS)


def preset(name: str) -> list[Workload]:
    """The rows of a named set, the most important first.

    Raises:
        ConfigError: there is no such set.
    """
    if name not in _PRESETS:
        raise ConfigError(f"preset is {name!r}; it must be one of {', '.join(PRESETS)}")
    return _PRESETS[name]()


def parse(text: str) -> Workload:
    """A row from words, e.g. ``"b1 h16 s4096 d128 bfloat16 sliding_window:1024"``.

    Raises:
        ConfigError: a word is unknown, or a size is missing.
    """
    sizes, dtype, lengths = {"b": 1}, "bfloat16", "none"
    pattern = FULL
    for word in text.split():
        size = _SIZE.fullmatch(word)
        kind, *values = word.split(":")
        if size:
            sizes[size[1]] = int(size[2])
        elif word in _DTYPES:
            dtype = word
        elif word in ("lengths:full", "lengths:random"):
            lengths = values[0]
        elif all(value.isdecimal() for value in values):
            pattern = Pattern(kind, tuple(map(int, values)))
        else:
            raise ConfigError(f"problem is {text!r}; the word {word!r} is not known")
    query, key = (sizes.get(name, sizes.get("s", 0)) for name in ("sq", "sk"))
    heads = sizes.get("h", 0)
    kv_heads = sizes.get("kv", heads)
    batch, dim = sizes["b"], sizes.get("d", 0)
    if min(batch, heads, kv_heads, query, key, dim) < 1 or heads % kv_heads:
        raise ConfigError(
            f"problem is {text!r}; it needs h, s (or sq and sk) and d of at least 1, and kv that "
            "divides h"
        )
    if query != key and pattern.kind != "full":
        raise ConfigError(f"problem is {text!r}; a pattern needs sq = sk")
    metric = "bandwidth" if query == 1 else "time"
    return Workload(
        "problem", batch, heads, kv_heads, query, key, dim, pattern, lengths, dtype, metric
    )
