"""Exported models, made once: torch's exporter takes seconds."""

import dataclasses
from pathlib import Path

import pytest
import torch

import portattn
from portattn import export, masks

SIZES = {0: "batch", 2: "queries"}, {0: "batch", 2: "keys"}, {0: "batch", 2: "keys"}


class Attention(torch.nn.Module):
    """Two attention calls with different masks and a projection between."""

    def __init__(self, first, second, dtype=torch.float32, **options):
        super().__init__()
        self.first, self.second, self.options = first, second, options
        self.projection = torch.nn.Linear(16, 16)
        self.to(dtype)

    def forward(self, query, key, value):
        options = {"enable_gqa": True, "q_offset": "end"} | self.options
        inner = portattn.attention(query, key, value, self.first, **options)
        return portattn.attention(self.projection(inner), key, value, self.second, **options)


def inputs(batch, seqlen_q, seqlen_k, dtype=torch.float32):
    """query [batch, 4, seqlen_q, 16], key and value [batch, 2, seqlen_k, 16]."""
    return (
        torch.randn(batch, 4, seqlen_q, 16).to(dtype),
        torch.randn(batch, 2, seqlen_k, 16).to(dtype),
        torch.randn(batch, 2, seqlen_k, 16).to(dtype),
    )


@dataclasses.dataclass(frozen=True)
class Exported:
    """A module and its file."""

    module: torch.nn.Module
    path: Path
    info: export.ExportInfo
    dtype: torch.dtype = torch.float32


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """float32; Longformer by positions, then a causal window."""
    torch.manual_seed(0)
    module = Attention(masks.longformer(16, [3, 9]), masks.sliding_window(20)).eval()
    return _export(module, tmp_path_factory.mktemp("export") / "float32.onnx", torch.float32)


@pytest.fixture(scope="session")
def exported_half(tmp_path_factory):
    """float16; is_causal with a mask, then BigBird."""
    torch.manual_seed(0)
    first, second = masks.local(30, None), masks.bigbird(8, 2, 3, 1, seed=1)
    module = Attention(first, second, torch.float16, is_causal=True, softcap=4.0).eval()
    return _export(module, tmp_path_factory.mktemp("export") / "float16.onnx", torch.float16)


def _export(module, path, dtype):
    info = export.to_onnx(module, inputs(2, 30, 50, dtype), path, dynamic_shapes=SIZES)
    return Exported(module, path, info, dtype)
