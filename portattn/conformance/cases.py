"""The named cases: what a kernel must compute, or refuse with a reason."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import torch

from portattn import masks

if TYPE_CHECKING:
    from collections.abc import Callable

    from portattn.masks import Mask


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One call.

    Attributes:
        name: as the command line and the tests name it.
        mask: makes the mask; None keeps everything.
        batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v: sizes.
        is_causal, q_offset, scale, softcap: arguments of `portattn.attention`.
        alibi: shape of the slopes: "" for none, "h" for [num_heads], "bh" for [batch, num_heads].
        bias: axes of the bias that are not 1, of "bhqk"; None for no bias.
        bias_cut: entries of the bias that are -inf: "some", one whole row ("row") or none ("").
        sinks: whether there are sinks.
        kv_lengths: one length for each batch, or () for none. Keys past them hold NaN.
        memory: how the tensors lie in memory: "bhsd", "bshd", or "padded": cut out of larger
            NaN-filled ones.
        poison: what one key that rows may attend to holds: "nan_key", "nan_value", "inf_value" or
            "".
    """

    name: str
    mask: Callable[[], Mask] | None = None
    batch: int = 2
    num_heads: int = 2
    num_kv_heads: int = 2
    seqlen_q: int = 200
    seqlen_k: int = 200
    head_dim: int = 64
    head_dim_v: int = 64
    is_causal: bool = False
    q_offset: int | Literal["end", "start"] | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: Literal["", "h", "bh"] = ""
    bias: str | None = None
    bias_cut: Literal["", "some", "row"] = ""
    sinks: bool = False
    kv_lengths: tuple[int, ...] = ()
    memory: Literal["bhsd", "bshd", "padded"] = "bhsd"
    poison: Literal["", "nan_key", "nan_value", "inf_value"] = ""


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _table(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=_generator(seed)) < 0.4


def _lengths(name: str, seqlen_q: int, seqlen_k: int, **others: object) -> Case:
    return Case(name, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **others)  # type: ignore[arg-type]


def _many(case: Case) -> Case:
    """The case with 128 rows: over a few, the eager error, which sets the bound, is luck."""
    return dataclasses.replace(case, batch=4, num_heads=32, num_kv_heads=32)


LENGTHS = (
    _lengths("dense", 200, 200),
    _lengths("dense_aligned", 128, 256),
    _lengths("dense_ragged", 129, 257),
    _lengths("dense_short", 5, 3),
    _lengths("length_1", 1, 1, is_causal=True),
    _lengths("single_key", 70, 1),
    _lengths("causal", 200, 200, is_causal=True),
    _lengths("causal_end", 77, 300, is_causal=True, q_offset="end"),
    _lengths("causal_start", 77, 300, is_causal=True, q_offset="start"),
    _lengths("causal_more_queries", 300, 77, is_causal=True, q_offset="end"),
    _lengths("causal_offset", 90, 160, is_causal=True, q_offset=31),
    _lengths("causal_negative_offset", 90, 160, is_causal=True, q_offset=-40),
    _many(_lengths("decode", 1, 300, is_causal=True, q_offset="end")),
    _many(
        _lengths("decode_window", 1, 1000, mask=lambda: masks.sliding_window(100), q_offset="end")
    ),
    _lengths("decode_gqa", 1, 515, num_heads=8, num_kv_heads=2),
    _lengths("few_queries", 4, 515, num_heads=8, num_kv_heads=2, is_causal=True, q_offset="end"),
    _lengths("cut_rows", 20, 3000, batch=1),
    _lengths("cut_rows_causal", 33, 2500, batch=1, is_causal=True, q_offset="end"),
)
HEADS = (
    Case("gqa_4", num_heads=8, is_causal=True),
    Case("gqa_7", num_heads=7, num_kv_heads=1, is_causal=True),
    Case("mqa_decode_7", num_heads=7, num_kv_heads=1, seqlen_q=1, seqlen_k=130),
    Case("batch_3", batch=3, num_heads=6, num_kv_heads=3, seqlen_q=50, seqlen_k=50),
    *(
        Case(f"head_dim_{dim}", head_dim=dim, head_dim_v=dim, batch=1, is_causal=True)
        for dim in (8, 32, 40, 72, 96, 128, 192, 256)
    ),
    Case("head_dim_1", head_dim=1, head_dim_v=1, batch=1),
    Case("head_dim_odd", head_dim=33, head_dim_v=45, batch=1),
    Case("value_narrower", head_dim=96, head_dim_v=40, is_causal=True),
    Case("value_wider", head_dim=40, head_dim_v=128, is_causal=True),
    # Eight heads: over fewer rows the eager error, which is the yardstick, is a matter of luck.
    Case("decode_value_wider", None, 2, 8, 8, seqlen_q=1, seqlen_k=140, head_dim_v=256),
)
MEMORY = (
    Case("bshd", memory="bshd", is_causal=True),
    Case("bshd_gqa", memory="bshd", num_heads=6, seqlen_q=65),
    Case("padded", memory="padded", is_causal=True, seqlen_q=131, seqlen_k=131),
    _many(Case("padded_decode", memory="padded", seqlen_q=1, seqlen_k=131)),
)
TERMS = (
    Case("scale_0", scale=0.0, is_causal=True),
    Case("scale_negative", scale=-0.3, is_causal=True),
    Case("scale_large", scale=3.0, is_causal=True),
    Case("softcap", softcap=5.0, scale=1.0, is_causal=True),
    Case("softcap_scale_negative", softcap=2.0, scale=-0.5),
    Case("alibi", alibi="h", is_causal=True),
    Case("alibi_two_sided", alibi="h"),
    Case("alibi_batch_end", alibi="bh", seqlen_q=60, seqlen_k=150, q_offset="end"),
    _many(Case("alibi_decode", alibi="h", seqlen_q=1, seqlen_k=150, q_offset="end")),
    Case("bias", bias="bhqk"),
    Case("bias_keys", bias="k", is_causal=True),
    Case("bias_heads", bias="hqk", num_heads=4, seqlen_q=77, seqlen_k=90),
    Case("bias_queries", bias="bq"),
    Case("bias_inf", bias="bhqk", bias_cut="some"),
    Case("bias_inf_row", bias="qk", bias_cut="row", is_causal=True),
    Case("sinks", sinks=True, is_causal=True),
    Case("sinks_empty_rows", sinks=True, mask=lambda: masks.QueryRange(60, 130)),
    Case("sinks_cut_rows", sinks=True, batch=1, seqlen_q=20, seqlen_k=3000),
    Case("sinks_decode", sinks=True, seqlen_q=1, seqlen_k=400, num_heads=4),
    Case("sinks_passes", sinks=True, mask=lambda: masks.sparse_transformer_strided(16)),
    Case(
        "all_terms",
        softcap=4.0,
        alibi="bh",
        bias="qk",
        bias_cut="some",
        sinks=True,
        is_causal=True,
        scale=0.7,
        num_heads=4,
    ),
    Case(
        "all_terms_window",
        softcap=4.0,
        alibi="h",
        bias="h",
        sinks=True,
        num_heads=4,
        seqlen_q=90,
        seqlen_k=170,
        q_offset="end",
        mask=lambda: masks.sliding_window(50),
    ),
    Case("kv_lengths", kv_lengths=(150, 61)),
    Case("kv_lengths_causal", kv_lengths=(150, 90), is_causal=True, seqlen_q=40),
    Case("kv_lengths_empty", kv_lengths=(0, 200), is_causal=True, seqlen_q=3),
    Case("kv_lengths_decode", kv_lengths=(1, 173), is_causal=True, seqlen_q=1, num_heads=8),
    Case(
        "kv_lengths_window",
        kv_lengths=(190, 77),
        mask=lambda: masks.sliding_window(30),
        seqlen_q=2,
    ),
    Case("kv_lengths_fewer_than_queries", kv_lengths=(5, 200), is_causal=True, seqlen_q=9),
    Case("kv_lengths_alibi_sinks", kv_lengths=(190, 77), alibi="h", sinks=True, seqlen_q=1),
    Case(
        "kv_lengths_streaming",
        kv_lengths=(190, 77),
        seqlen_q=1,
        mask=lambda: masks.streaming_llm(4, 40),
    ),
)
PRESETS = (
    Case("local", mask=lambda: masks.local(20, 9)),
    Case("local_left_only", mask=lambda: masks.local(33, None), seqlen_q=90, q_offset=50),
    Case("sliding_window", mask=lambda: masks.sliding_window(37)),
    Case("longformer", mask=lambda: masks.longformer(32, 3)),
    Case("longformer_positions", mask=lambda: masks.longformer(16, [0, 77, 150])),
    Case("longformer_dilated", mask=lambda: masks.longformer(16, 2, dilation=3)),
    Case("bigbird", mask=lambda: masks.bigbird(16, 2, 3, 1, seed=7), num_heads=4),
    Case("bigbird_end", mask=lambda: masks.bigbird(16), seqlen_q=90, q_offset="end"),
    Case("strided", mask=lambda: masks.sparse_transformer_strided(16)),
    Case(
        "strided_odd",
        mask=lambda: masks.sparse_transformer_strided(7),
        seqlen_q=150,
        q_offset="end",
    ),
    Case("fixed", mask=lambda: masks.sparse_transformer_fixed(16, 2)),
    Case("dilated", mask=lambda: masks.dilated(24, 4)),
    Case("dilated_causal", mask=lambda: masks.dilated(24, 5), is_causal=True),
    Case("prefix_lm", mask=lambda: masks.prefix_lm(70)),
    Case("streaming_llm", mask=lambda: masks.streaming_llm(4, 30)),
    Case("documents", mask=lambda: masks.documents([0, 50, 51, 130, 200])),
    Case("documents_causal", mask=lambda: masks.documents([0, 90, 200]), is_causal=True),
    _lengths("documents_long", 421, 421, mask=lambda: masks.documents([0, 170, 421])),
    Case(
        "documents_end",
        mask=lambda: masks.documents([0, 90, 120, 200]),
        is_causal=True,
        seqlen_q=70,
        q_offset="end",
    ),
    Case("padding", mask=lambda: masks.padding([200, 83])),
    Case("padding_empty", mask=lambda: masks.padding([0, 129]), is_causal=True),
    Case("block_sparse", mask=lambda: masks.block_sparse(_table(7, 7), 32)),
    Case("block_sparse_heads", mask=lambda: masks.block_sparse(_table(2, 4, 4), (64, 64))),
    Case("block_sparse_batch", mask=lambda: masks.block_sparse(_table(2, 1, 13, 5), (16, 40))),
    Case("dense_mask", mask=lambda: masks.dense(_table(200, 200))),
    Case(
        "dense_mask_batch_heads",
        mask=lambda: masks.dense(_table(2, 2, 80, 80)),
        seqlen_q=80,
        seqlen_k=80,
    ),
)
EXPRESSIONS = (
    Case("empty_rows", mask=lambda: masks.QueryRange(20, 150) & masks.causal()),
    Case("empty_all", mask=lambda: ~masks.All()),
    Case(
        "empty_rows_one_pass",
        mask=lambda: masks.local(3, 3) | (masks.DiffModulo(8, 0, 1) & masks.QueryRange(90, 200)),
    ),
    Case(
        "empty_window_one_pass",
        mask=lambda: (
            (masks.Band(-9, 0) & masks.QueryRange(0, 60))
            | (masks.DiffModulo(8, 0, 1) & masks.Band(None, -20))
        ),
    ),
    Case(
        "empty_piece", mask=lambda: masks.KeyRange(1500, 1600), batch=1, seqlen_q=20, seqlen_k=3000
    ),
    Case("stepped_tiles", mask=lambda: masks.KeyModulo(8, 0, 1)),
    Case("stepped_tiles_window", mask=lambda: masks.local(15, 15) | masks.KeyModulo(16, 0, 1)),
    Case("stepped_rows", mask=lambda: masks.DiffModulo(8, 3, 4)),
    Case("stepped_wide", mask=lambda: masks.DiffModulo(5, 1, 4), seqlen_q=64, q_offset=9),
    Case("block_band", mask=lambda: masks.BlockBand(24, -1, 0)),
    Case("same_block_offset", mask=lambda: masks.SameBlock(30), seqlen_q=100, q_offset=55),
    Case("key_set", mask=lambda: masks.KeySet([0, 5, 6, 100, 199]) | masks.local(4, 4)),
    Case("query_set", mask=lambda: masks.QuerySet([3, 64, 65]) | masks.causal()),
    Case("segments_batch", mask=lambda: masks.Segments(torch.arange(400).reshape(2, 200) // 37)),
    Case(
        "segments_two_sided",
        mask=lambda: masks.Segments(torch.arange(200) // 50, torch.arange(200) // 40),
    ),
    Case("negation", mask=lambda: ~masks.local(20, 20)),
    Case("negated_documents", mask=lambda: ~masks.documents([0, 60, 200])),
    Case(
        "composed",
        mask=lambda: (masks.sliding_window(40) | masks.KeyRange(0, 9)) & ~masks.KeyModulo(3, 1, 2),
    ),
    Case(
        "two_segments",
        mask=lambda: masks.documents([0, 60, 200]) & masks.Segments(torch.arange(200) % 3),
    ),
    Case("per_head", mask=lambda: masks.per_head([masks.causal(), masks.local(9, 9)])),
    Case(
        "per_head_passes",
        mask=lambda: masks.per_head([masks.sparse_transformer_strided(8), masks.causal()]),
    ),
    Case(
        "per_head_gqa",
        num_heads=4,
        mask=lambda: masks.per_head(
            [masks.causal(), masks.local(9, 9), masks.KeyRange(0, 70), ~masks.All()]
        ),
    ),
    Case("per_batch", mask=lambda: masks.per_batch([masks.causal(), masks.KeyRange(50, 90)])),
    Case("far_offset", mask=lambda: masks.sliding_window(64), seqlen_q=60, q_offset=150),
    Case("beyond_keys", mask=lambda: masks.sliding_window(64), seqlen_q=60, q_offset=1000),
)
VALUES = (
    Case("nan_key", poison="nan_key", is_causal=True),
    Case("nan_value", poison="nan_value", is_causal=True),
    Case("inf_value", poison="inf_value"),
    Case("nan_key_decode", poison="nan_key", seqlen_q=1, seqlen_k=150),
)

CASES: dict[str, Case] = {
    case.name: case
    for case in (*LENGTHS, *HEADS, *MEMORY, *TERMS, *PRESETS, *EXPRESSIONS, *VALUES)
}
