"""Checks the attention calls of a captured module before it is translated."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

import portattn.ops  # noqa: F401  defines torch.ops.portattn
from portattn.errors import ExportError
from portattn.export.expression import Opcode, parse_program
from portattn.export.schema import MAX_MASK_INPUTS

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_ARGUMENTS = (
    "query",
    "key",
    "value",
    "program",
    "mask_data",
    "q_offset",
    "q_offset_mode",
    "kv_lengths",
)


def check_calls(program: ExportedProgram) -> None:
    """Every ``portattn::attention`` in the program can be a node.

    Raises:
        ExportError: one cannot; names the argument, and a way out.
    """
    target = torch.ops.portattn.attention.default
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target is target:
                _check_call(dict(zip(_ARGUMENTS, node.args, strict=False)), node)


def _check_call(arguments: dict[str, Any], node: torch.fx.Node) -> None:
    lse = node.meta["val"][1]
    where = f"attention node {node.name}"
    query = arguments["query"].meta["val"]
    if query.dtype not in (torch.float32, torch.float16):
        name = str(query.dtype).removeprefix("torch.")
        raise ExportError(
            f"{where}: query has dtype {name}; ONNX Runtime's CPU provider has no {name} for the "
            "standard ops "
            "that the function body needs: export module.half() or module.float()"
        )
    for name in ("query", "key", "value"):
        shape = arguments[name].meta["val"].shape
        for axis, meaning in ((1, "heads"), (3, "head_dim")):
            if not isinstance(shape[axis], int):
                raise ExportError(
                    f"{where}: the {meaning} of {name} (axis {axis} of {tuple(shape)}) is "
                    "dynamic; only batch "
                    "and lengths may be: leave that dimension out of dynamic_shapes"
                )
    if len(arguments["mask_data"]) > MAX_MASK_INPUTS:
        raise ExportError(
            f"{where}: the mask has {len(arguments['mask_data'])} data tensors, a node takes "
            f"{MAX_MASK_INPUTS}; "
            "merge them, e.g. into one block table per head"
        )
    opcodes = {part.opcode for part in parse_program(arguments["program"]).walk()}
    if arguments["kv_lengths"] is not None and Opcode.RANDOM_BLOCKS in opcodes:
        raise ExportError(
            f"{where}: RandomBlocks draws from all keys, which kv_lengths makes depend on the "
            "batch; use a "
            "block table (masks.block_sparse), or a padding() mask instead of kv_lengths"
        )
    used = any(
        user.target is operator.getitem and user.args[1] == 1 and user.users for user in node.users
    )
    if used and lse.ndim == 1:
        raise ExportError(f"{where}: its LSE is used but was not asked for: pass return_lse=True")
