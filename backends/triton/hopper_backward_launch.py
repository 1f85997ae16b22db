"""Launches of the Hopper backward for a call: rows made ready, one per pass, sums finished."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from portattn.backends.triton.backward_config import block_width
from portattn.backends.triton.backward_launch import seed_of
from portattn.backends.triton.backward_rows import PREPARE_PARAMETERS, prepare_rows
from portattn.backends.triton.backward_sides import NamedLaunch, add_strides
from portattn.backends.triton.backward_terms import fill_sinks
from portattn.backends.triton.geometry import vector_elements
from portattn.backends.triton.hopper_adapter import TensorDescriptor, gl
from portattn.backends.triton.hopper_backward_config import BLOCK_K, BLOCK_Q, width_of
from portattn.backends.triton.hopper_backward_finish import FINISH_PARAMETERS, finish_rows
from portattn.backends.triton.hopper_backward_kernel import (
    LAUNCH_REGISTERS,
    MAPS,
    RUNTIME_PARAMETERS,
    hopper_backward,
)
from portattn.backends.triton.hopper_maps import describe, long_residues, readable
from portattn.backends.triton.hopper_variant import pass_of
from portattn.plan import to_device

if TYPE_CHECKING:
    from portattn.backends.base import AttentionGradients, AttentionInputs
    from portattn.backends.triton.fast_launch import Describe
    from portattn.backends.triton.hopper_backward_config import TritonBackwardHopperConfig
    from portattn.backends.triton.hopper_variant import HopperPass
    from portattn.plan import Plan, Schedule

_PREPARE_ROWS = 64
_FINISH_ROWS = 32


class HopperBackwardCall:
    """One kind of backward, ready to be repeated (`backward_launch.backward_key`). Thread-safe.

    It holds the device's arrays of the plan and the schedule, and neither of the two.

    Attributes:
        used: see plan.cache.KeptCall.
    """

    def __init__(
        self,
        inputs: AttentionInputs,
        gradients: AttentionGradients,
        plan: Plan,
        schedule: Schedule,
        config: TritonBackwardHopperConfig,
    ) -> None:
        """Work out every launch; nothing is launched yet.

        Args:
            inputs, gradients, config: of the call.
            plan: transposed.
            schedule: of the plan, for KV heads.
        """
        self.used = True
        self._config, self._device = config, inputs.query.device
        self._width = width_of(inputs.query.shape[3], inputs.value.shape[3])
        self._on_device = to_device(plan, schedule, self._device)
        # Items that share keys add to them; else each writes its own.
        self._adds = plan.num_passes > 1 or schedule.num_slots > 0
        self._layouts = (
            plan.layout_heads if plan.layout_batch > 1 else 0,
            1 if plan.layout_heads > 1 else 0,
            plan.num_layouts,
        )
        self._launches = [self._prepare(inputs, gradients)]
        for index in range(plan.num_passes):
            self._launches.append(self._main(inputs, pass_of(plan, schedule, index)))
        self._finish: list[NamedLaunch] = []
        if gradients.query is not None:
            self._finish.append(self._finishing("dq", inputs.query, inputs.scale))
        if self._adds and gradients.key is not None:
            self._finish.append(self._finishing("dk", inputs.key, inputs.scale))
        if self._adds and gradients.value is not None:
            self._finish.append(self._finishing("dv", inputs.value, 1.0))

    def run(self, inputs: AttentionInputs, gradients: AttentionGradients) -> bool:
        """Launch on the inputs' device, which is the current one, and current stream.

        Returns:
            Whether a CUDA graph was being captured: then the plan must be kept.
        """
        self.used = True
        plan_on, schedule_on = self._on_device
        capturing = plan_on.use() | schedule_on.use()
        batch, num_heads, seqlen_q, _ = inputs.query.shape
        tensors: dict[str, torch.Tensor] = {
            "query": readable(inputs.query),
            "key": readable(inputs.key),
            "value": readable(inputs.value),
            "output": inputs.output,
            "seed": readable(seed_of(inputs, gradients)),
            "stats": inputs.query.new_empty((batch, num_heads, 2, seqlen_q), dtype=torch.float32),
        }
        if inputs.lse is not None:
            tensors["lse"] = inputs.lse
        if gradients.lse is not None:
            tensors["dlse"] = gradients.lse
        tensors["dq_sums"] = self._zeros(inputs.query)
        for name, source, target in (
            ("dk", inputs.key, gradients.key),
            ("dv", inputs.value, gradients.value),
        ):
            written = torch.empty_like(source, memory_format=torch.contiguous_format)
            tensors[name] = target if target is not None else written
            tensors[f"{name}_sums"] = self._zeros(source) if self._adds else tensors[name]
        if gradients.query is not None:
            tensors["dq"] = gradients.query
        for launch in (*self._launches, *self._finish):
            launch(tensors)
        if gradients.sinks is not None and inputs.sinks is not None:
            fill_sinks(gradients.sinks, inputs.sinks, tensors["stats"])
        return capturing

    def _zeros(self, source: torch.Tensor) -> torch.Tensor:
        sizes = (*source.shape[:3], self._width)
        return torch.zeros(sizes, dtype=torch.float32, device=self._device)

    def _prepare(self, inputs: AttentionInputs, gradients: AttentionGradients) -> NamedLaunch:
        batch, num_heads, seqlen_q, head_dim_v = inputs.output.shape
        seed = readable(seed_of(inputs, gradients))
        vector = vector_elements((inputs.output, seed))
        values: dict[str, Any] = {"num_heads": num_heads, "seqlen_q": seqlen_q}
        add_strides(values, "out", inputs.output, vector)
        add_strides(values, "do", seed, vector)
        add_strides(values, "lse", inputs.lse)
        add_strides(values, "dlse", gradients.lse)
        has_dlse = gradients.lse is not None
        moving = {"out_ptr": "output", "do_ptr": "seed", "lse_ptr": "lse", "stats_ptr": "stats"}
        moving |= {"dlse_ptr": "dlse"} if has_dlse else {}
        constants = head_dim_v, block_width(head_dim_v), vector, _PREPARE_ROWS, has_dlse
        grid = batch * num_heads * -(-seqlen_q // _PREPARE_ROWS)
        options = {"num_warps": 4, "num_stages": 1}
        return NamedLaunch(
            prepare_rows, PREPARE_PARAMETERS, values, constants, moving, grid, options,
            self._device,
        )  # fmt: skip

    def _finishing(self, name: str, source: torch.Tensor, scale: float) -> NamedLaunch:
        batch, heads, length, head_dim = source.shape
        values: dict[str, Any] = {"num_heads": heads, "length": length, "head_dim": head_dim}
        # Gradients are contiguous.
        values |= {"stride_b": heads * length * head_dim, "stride_h": length * head_dim}
        values["stride_s"] = head_dim
        grid = batch * heads * -(-length // _FINISH_ROWS)
        return NamedLaunch(
            finish_rows, FINISH_PARAMETERS, values, (scale, self._width, _FINISH_ROWS),
            {"sums_ptr": f"{name}_sums", "out_ptr": name}, grid,
            {"num_warps": 4, "num_stages": 1}, self._device,
        )  # fmt: skip

    def _main(self, inputs: AttentionInputs, shape: HopperPass) -> NamedLaunch:
        batch, num_heads, seqlen_q, head_dim = inputs.query.shape
        num_kv_heads, seqlen_k, head_dim_v = inputs.key.shape[1], *inputs.value.shape[2:]
        plan_on, schedule_on = self._on_device
        values: dict[str, Any] = {
            "items_ptr": schedule_on.items,
            "full_list_ptr": schedule_on.full_list,
            "tiles_ptr": plan_on.tiles,
            "bits_ptr": plan_on.bits,
            "layouts_ptr": plan_on.layouts,
            "layout_stride_b": self._layouts[0],
            "layout_stride_h": self._layouts[1],
            "num_layouts": self._layouts[2],
            "first_item": shape.first_item,
            "num_items": shape.num_items,
            "num_bh": batch * num_kv_heads,
            "num_heads": num_heads,
            "group_size": num_heads // num_kv_heads,
            "head_group": self._config.head_group,
            "seqlen_q": seqlen_q,
            "seqlen_k": seqlen_k,
            "q_residues": long_residues(seqlen_q, shape.k_step),
            "k_residues": long_residues(seqlen_k, shape.q_step),
            "head_dim": head_dim,
            "head_dim_v": head_dim_v,
        }
        if shape.ids:
            ids = {name: getattr(plan_on, name) for name in ("layout_ids", "q_ids", "k_ids")}
            values |= {f"{name}_ptr": tensor for name, tensor in ids.items()}
        for name, width in (("dk", head_dim), ("dv", head_dim_v)):
            values[f"{name}_stride_b"] = num_kv_heads * seqlen_k * width
            values |= {f"{name}_stride_h": seqlen_k * width, f"{name}_stride_s": width}
        moving = {
            "stats_ptr": "stats", "dk_ptr": "dk_sums", "dv_ptr": "dv_sums",
        }  # fmt: skip
        maps = {name: tensor for name, tensor in MAPS.items() if _has_map(name, shape)}
        constants = (
            inputs.scale, self._config.num_stages, self._config.registers, shape.stepped,
            shape.ids, self._adds,
        )  # fmt: skip
        return NamedLaunch(
            hopper_backward, (*MAPS, *RUNTIME_PARAMETERS), values, constants, maps | moving,
            shape.num_items * values["num_bh"],
            {"num_warps": 4, "maxnreg": LAUNCH_REGISTERS}, self._device,
            {name: _map(name, shape, self._width) for name in maps},
        )  # fmt: skip


def _has_map(name: str, shape: HopperPass) -> bool:
    return name.endswith("_desc") or shape.stepped


def _describe_sums(step: int, short: bool, width: int, sums: torch.Tensor) -> TensorDescriptor:
    """The map of dQ's float32 sums: like that of the queries, for half of their columns."""
    found = describe(step, short, BLOCK_Q, width, sums)
    layout = gl.NVMMASharedLayout(128, 32, rank=5)
    return TensorDescriptor(found.base, found.shape, found.strides, found.block_shape, layout)


def _map(name: str, shape: HopperPass, width: int) -> Describe:
    """What makes a descriptor. Rows of the transposed plan are keys, its tiles are queries."""
    tensor, _, form = name.partition("_")
    if tensor == "dq":
        step = 1 if form == "desc" else shape.k_step
        return functools.partial(_describe_sums, step, form == "short", width // 2)
    is_row = tensor in ("k", "v")
    step = shape.q_step if is_row else 1 if form == "desc" else shape.k_step
    rows = BLOCK_K if is_row else BLOCK_Q
    return functools.partial(describe, step, form == "short", rows, width)
