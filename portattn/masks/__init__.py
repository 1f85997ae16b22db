"""Masks: which keys a query may attend to. Primitives, their algebra, and known patterns."""

from portattn.masks.mask import All, Mask
from portattn.masks.packed import Documents
from portattn.masks.positions import resolve_q_offset
from portattn.masks.presets import (
    bigbird,
    block_sparse,
    causal,
    dense,
    dilated,
    documents,
    local,
    longformer,
    padding,
    prefix_lm,
    sliding_window,
    sparse_transformer_fixed,
    sparse_transformer_strided,
    streaming_llm,
)
from portattn.masks.primitives import (
    Band,
    BlockBand,
    DiffModulo,
    KeyModulo,
    KeyRange,
    QueryRange,
    RandomBlocks,
    SameBlock,
)
from portattn.masks.program import from_json, from_program
from portattn.masks.selection import per_batch, per_head
from portattn.masks.tables import BlockTable, KeyLengths, KeySet, QuerySet, Segments

__all__ = [
    "All",
    "Band",
    "BlockBand",
    "BlockTable",
    "DiffModulo",
    "Documents",
    "KeyLengths",
    "KeyModulo",
    "KeyRange",
    "KeySet",
    "Mask",
    "QueryRange",
    "QuerySet",
    "RandomBlocks",
    "SameBlock",
    "Segments",
    "bigbird",
    "block_sparse",
    "causal",
    "dense",
    "dilated",
    "documents",
    "from_json",
    "from_program",
    "local",
    "longformer",
    "padding",
    "per_batch",
    "per_head",
    "prefix_lm",
    "resolve_q_offset",
    "sliding_window",
    "sparse_transformer_fixed",
    "sparse_transformer_strided",
    "streaming_llm",
]
