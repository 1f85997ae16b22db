"""The sessions of benchmarks/onnx_attention.py: exported files and ONNX Runtime's own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
from onnx import NodeProto, TensorProto, helper

import portattn
from portattn import export, masks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BATCH, HEADS, HEAD_DIM, WINDOW = 1, 8, 64, 256
MICROSOFT = "com.microsoft"


@dataclasses.dataclass(frozen=True)
class Case:
    """One session to measure.

    Attributes:
        name: as printed.
        mask: "window" or "causal": what it computes.
        open: makes a fresh session.
        feeds: the inputs, from query, key, value [1, heads, seqlen, head_dim].
        heads_last: the output is [1, seqlen, heads * head_dim].
    """

    name: str
    mask: str
    open: Callable[[], onnxruntime.InferenceSession]
    feeds: dict[str, Any]
    heads_last: bool = False

    def output(self, session: onnxruntime.InferenceSession) -> np.ndarray:
        """[heads, seqlen, head_dim]."""
        result: np.ndarray = session.run(None, self.feeds)[0]
        if self.heads_last:
            return result.reshape(result.shape[1], HEADS, HEAD_DIM).transpose(1, 0, 2)
        return result[0]


class Module(torch.nn.Module):
    """One attention call."""

    def __init__(self, mask: masks.Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """portattn.attention with the mask."""
        return portattn.attention(query, key, value, self.mask)


def options(threads: int) -> onnxruntime.SessionOptions:
    """Session options that all share."""
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = threads
    return made


def exported(mask: masks.Mask, folder: Path, name: str) -> Path:
    """The module with this mask, exported at another length than it is run at."""
    example = torch.zeros(2, HEADS, 512, HEAD_DIM)
    sizes = {0: "batch", 2: "seqlen"}
    path = folder / f"{name}.onnx"
    export.to_onnx(Module(mask).eval(), (example,) * 3, path, dynamic_shapes=(sizes,) * 3)
    return path


def open_exported(path: Path, threads: int, *, library: bool) -> onnxruntime.InferenceSession:
    """A session of an exported file, with libportattn or by its function bodies."""
    opened = export.session(path, session_options=options(threads), use_library=library)
    return opened.inference_session


def node_model(
    node: NodeProto, shapes: dict[str, tuple[int, list[Any]]], output: list[Any]
) -> bytes:
    """A model of one node of ONNX Runtime's own."""
    graph = helper.make_graph(
        [node],
        "attention",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, (kind, shape) in shapes.items()
        ],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, output)],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    model: bytes = helper.make_model(
        graph, opset_imports=opsets, ir_version=10
    ).SerializeToString()
    return model


def peer_models() -> dict[str, bytes]:
    """ONNX Runtime's own attention operators, by case name."""
    rows = [BATCH, "S", HEADS * HEAD_DIM]
    split = [BATCH, HEADS, "S", HEAD_DIM]
    qkv = {name: (TensorProto.FLOAT, rows) for name in "QKV"}
    scalars = {"lengths": (TensorProto.INT32, [BATCH]), "total": (TensorProto.INT32, [])}
    grouped = helper.make_node(
        "GroupQueryAttention",
        ["Q", "K", "V", "", "", "lengths", "total"],
        ["Y", "present_key", "present_value"],
        domain=MICROSOFT,
        num_heads=HEADS,
        kv_num_heads=HEADS,
        local_window_size=WINDOW,
    )
    multi_head = helper.make_node(
        "MultiHeadAttention",
        ["Q", "K", "V"],
        ["Y"],
        domain=MICROSOFT,
        num_heads=HEADS,
        unidirectional=1,
    )
    masked = helper.make_node("Attention", ["Q", "K", "V", "mask"], ["Y"])
    split_qkv = {name: (TensorProto.FLOAT, split) for name in "QKV"}
    return {
        "GroupQueryAttention": node_model(grouped, qkv | scalars, rows),
        "MultiHeadAttention": node_model(multi_head, qkv, rows),
        "Attention-23": node_model(
            masked, split_qkv | {"mask": (TensorProto.BOOL, ["S", "S"])}, split
        ),
    }


def make_cases(seqlen: int, threads: int, folder: Path) -> list[Case]:
    """All sessions, with one set of inputs."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(BATCH, HEADS, seqlen, HEAD_DIM, generator=generator) for _ in range(3)]
    split = dict(zip("QKV", (tensor.numpy() for tensor in tensors), strict=True))
    rows = {
        name: np.ascontiguousarray(tensor.transpose(0, 2, 1, 3)).reshape(BATCH, seqlen, -1)
        for name, tensor in split.items()
    }
    named = dict(zip(("query", "key", "value"), split.values(), strict=True))
    lengths = {"lengths": np.array([seqlen - 1], np.int32), "total": np.array(seqlen, np.int32)}
    distance = np.arange(seqlen)[:, None] - np.arange(seqlen)[None, :]
    window = {"mask": (distance >= 0) & (distance < WINDOW)}
    models = peer_models()
    files = {
        "window": exported(masks.sliding_window(WINDOW), folder, "window"),
        "causal": exported(masks.causal(), folder, "causal"),
    }

    def ours(mask: str, *, library: bool) -> Callable[[], onnxruntime.InferenceSession]:
        return lambda: open_exported(files[mask], threads, library=library)

    def peer(name: str) -> Callable[[], onnxruntime.InferenceSession]:
        return lambda: onnxruntime.InferenceSession(models[name], options(threads))

    return [
        Case("portattn, library", "window", ours("window", library=True), named),
        Case("portattn, function body", "window", ours("window", library=False), named),
        Case("GroupQueryAttention", "window", peer("GroupQueryAttention"), rows | lengths, True),
        Case("Attention-23, mask", "window", peer("Attention-23"), split | window),
        Case("portattn, library", "causal", ours("causal", library=True), named),
        Case("MultiHeadAttention", "causal", peer("MultiHeadAttention"), rows, True),
    ]
