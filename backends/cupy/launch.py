"""What a call passes to the kernel: plan, schedule, scratch memory, the argument of each pass."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from portattn.backends.cupy import config as configs
from portattn.backends.cupy.params import pack, pointer
from portattn.plan import plan_mask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portattn.backends.base import AttentionInputs
    from portattn.backends.cupy.config import ForwardSm80Config, Variant
    from portattn.plan import DevicePlan, DeviceSchedule, Plan, Schedule

_LOG2_E = 1.4426950408889634
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """Everything that the passes of one call share. Holds the tensors that the pointers are of."""

    variant: Variant
    plan: Plan
    schedule: Schedule
    on_device: tuple[DevicePlan, DeviceSchedule]
    scratch: Mapping[str, torch.Tensor | None]
    values: dict[str, int | float]
    heads: int

    @property
    def num_passes(self) -> int:
        """Launches that the call takes, one after the other."""
        return int(self.plan.num_passes)

    def pass_params(self, index: int) -> tuple[int, bytes]:
        """Blocks to launch for a pass, and the kernel's argument."""
        items = self.on_device[1].items
        per_layout = int(self.schedule.items_per_pass[index])
        self.values.update(
            items=items.data_ptr() + int(self.schedule.item_ptr[index]) * items.shape[1] * 4,
            num_items=per_layout,
            continues=int(index > 0),
            last_pass=int(index == self.num_passes - 1),
        )
        return per_layout * self.heads, pack(self.values)


def prepare(inputs: AttentionInputs, config: ForwardSm80Config, workers: int) -> Launch:
    """Plan and schedule the call, allocate its scratch memory, and fill in the argument.

    Args:
        inputs: the call.
        config: feasible for it.
        workers: blocks that run at once on the device.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    batch, num_heads, seqlen_q, head_dim = query.shape
    head_dim_v = value.shape[3]
    plan = plan_mask(
        inputs.mask,
        batch=batch,
        num_heads=num_heads,
        seqlen_q=seqlen_q,
        seqlen_k=key.shape[2],
        q_offset=inputs.q_offset,
        block_q=config.block_q,
        block_k=config.block_k,
    )
    schedule = plan.schedule(
        batch=batch, num_heads=num_heads, workers=workers, head_dim_v=head_dim_v
    )
    terms = inputs.softcap != 0, inputs.alibi_slopes is not None, inputs.bias is not None
    aligned = all(_is_aligned(tensor) for tensor in (query, key, value, inputs.output))
    variant = configs.variant(_DTYPES[query.dtype], head_dim, head_dim_v, aligned, terms, config)
    on_device = plan.to(query.device), schedule.to(query.device)
    scratch = _scratch(plan, schedule, batch * num_heads, head_dim_v, query.device)
    values = _input_values(inputs) | _plan_values(plan, schedule, on_device, scratch)
    values["head_group"] = min(config.head_group, batch * num_heads)
    return Launch(variant, plan, schedule, on_device, scratch, values, batch * num_heads)


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Every row starts at a multiple of 16 bytes. Strides of size-1 dimensions are never used."""
    unit = 16 // tensor.element_size()
    strides = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return tensor.data_ptr() % 16 == 0 and all(
        size == 1 or stride % unit == 0 for size, stride in strides
    )


def _scratch(
    plan: Plan, schedule: Schedule, heads: int, head_dim_v: int, device: torch.device
) -> dict[str, torch.Tensor | None]:
    """Workspace of cut rows, and running rows of several passes; None where not needed."""

    def floats(*shape: int) -> torch.Tensor | None:
        needed = 0 not in shape
        return torch.empty(shape, dtype=torch.float32, device=device) if needed else None

    rows = plan.seqlen_q if plan.num_passes > 1 else 0
    counters = heads * schedule.num_counters
    return {
        "piece_output": floats(heads, schedule.num_slots, plan.block_q, head_dim_v),
        "piece_lse": floats(heads, schedule.num_slots, plan.block_q),
        # Not shared between calls: two streams may run at once.
        "counters": torch.zeros(counters, dtype=torch.int32, device=device) if counters else None,
        "running_output": floats(heads, rows, head_dim_v),
        "running_lse": floats(heads, rows),
    }


def _input_values(inputs: AttentionInputs) -> dict[str, int | float]:
    batch, num_heads, seqlen_q, head_dim = inputs.query.shape
    scale = abs(inputs.scale) if inputs.scale != 0 else 1.0
    values: dict[str, int | float] = {
        "query": pointer(inputs.query),
        "key": pointer(inputs.key),
        "value": pointer(inputs.value),
        "output": pointer(inputs.output),
        "lse": pointer(inputs.lse),
        "alibi": pointer(inputs.alibi_slopes),
        "bias": pointer(inputs.bias),
        "sinks": pointer(inputs.sinks),
        "q_offset": inputs.q_offset,
        "batch": batch,
        "num_heads": num_heads,
        "group_size": num_heads // inputs.key.shape[1],
        "seqlen_q": seqlen_q,
        "seqlen_k": inputs.key.shape[2],
        "head_dim": head_dim,
        "head_dim_v": inputs.value.shape[3],
        # The scale's sign, or that it is 0, goes into the query.
        "query_factor": 0 if inputs.scale == 0 else 1 if inputs.scale > 0 else -1,
        "scale": scale,
        "scale_log2": scale * _LOG2_E,
        "softcap": inputs.softcap,
        "softcap_inverse": scale / inputs.softcap if inputs.softcap != 0 else 0.0,
    }
    strided: tuple[tuple[str, Any], ...] = (
        ("query", inputs.query),
        ("key", inputs.key),
        ("value", inputs.value),
        ("output", inputs.output),
        ("lse", inputs.lse),
        ("bias", inputs.bias),
    )
    for name, tensor in strided:
        strides = (0, 0, 0, 0) if tensor is None else tensor.stride()
        axes = ("batch", "head", "row", "key")[: 4 if name == "bias" else 3]
        values |= {f"{name}_stride_{axis}": strides[n] for n, axis in enumerate(axes)}
    slopes = inputs.alibi_slopes
    values["alibi_stride_batch"] = (
        slopes.stride(0) if slopes is not None and slopes.ndim == 2 else 0
    )
    values["alibi_stride_head"] = 0 if slopes is None else slopes.stride(-1)
    values["sinks_stride_head"] = 0 if inputs.sinks is None else inputs.sinks.stride(0)
    return values


def _plan_values(
    plan: Plan,
    schedule: Schedule,
    on_device: tuple[DevicePlan, DeviceSchedule],
    scratch: Mapping[str, torch.Tensor | None],
) -> dict[str, int | float]:
    names = ("tiles", "bits", "bit_ranges", "layouts", "layout_ids", "q_ids", "k_ids")
    values: dict[str, int | float] = {name: pointer(getattr(on_device[0], name)) for name in names}
    values |= {name: pointer(tensor) for name, tensor in scratch.items()}
    return values | {
        "full_list": pointer(on_device[1].full_list),
        "layout_batch": plan.layout_batch,
        "layout_heads": plan.layout_heads,
        "num_slots": schedule.num_slots,
        "num_counters": schedule.num_counters,
    }
