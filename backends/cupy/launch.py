"""What a call passes to the kernel: schedule, scratch memory, the argument of each pass."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from portattn.backends.cuda_launch import Field
from portattn.backends.cupy import config as configs
from portattn.backends.cupy.params import offset_of, pack, pointer
from portattn.backends.renewal import MOST_BLOCKS, PLAN_ARRAYS, SCHEDULE_ARRAYS, renewal_of
from portattn.plan import to_device
from portattn.plan.abi import ITEM_FIELDS

if TYPE_CHECKING:
    from portattn.backends.base import AttentionInputs
    from portattn.backends.cupy.config import ForwardSm80Config, Variant
    from portattn.backends.renewal import Renewal
    from portattn.plan import DevicePlan, DeviceSchedule, Plan, Schedule

LOG2_E = 1.4426950408889634
DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


# The kernel's own kind of variant.
VariantT = TypeVar("VariantT")


@dataclasses.dataclass(frozen=True, slots=True)
class Launch(Generic[VariantT]):
    """Everything that the passes of one call share, but for what changes from call to call.

    Attributes:
        variant: which kernel.
        schedule: of the plan.
        on_device: the plan's and the schedule's arrays.
        values: fields of the kernel's argument by name.
        heads: batch * num_heads.
        num_passes: launches that the call takes, one after the other.
        scratch_sizes: floats of piece_output, piece_lse, running_output and running_lse, rounded
            up so that each starts at a multiple of 16 bytes.
        num_counters: int32 arrival counters of all heads.
        renewal: how other masks are planned for the launch; None where it cannot be reused.
    """

    variant: VariantT
    schedule: Schedule
    on_device: tuple[DevicePlan, DeviceSchedule]
    values: dict[str, int | float]
    heads: int
    num_passes: int
    scratch_sizes: tuple[int, int, int, int]
    num_counters: int
    renewal: Renewal | None

    @property
    def most_blocks(self) -> int:
        """The largest grid of a pass."""
        return MOST_BLOCKS

    def plan_fields(self) -> list[Field]:
        """Where a pass's arguments have numbers of the plan."""
        addresses = (*PLAN_ARRAYS, *SCHEDULE_ARRAYS)
        return [
            *(Field(0, offset_of(name), name) for name in addresses),
            Field(0, offset_of("num_items"), "num_items", is_address=False),
        ]

    def pass_params(self, index: int) -> tuple[int, bytes]:
        """Blocks to launch for a pass, and the kernel's argument without its scratch memory."""
        per_layout = int(self.schedule.items_per_pass[index])
        first = int(self.schedule.item_ptr[index])
        self.values.update(
            items=self.on_device[1].address("items") + first * ITEM_FIELDS * 4,
            num_items=per_layout,
            continues=int(index > 0),
            last_pass=int(index == self.num_passes - 1),
        )
        return per_layout * self.heads, pack(self.values)


def prepare(
    inputs: AttentionInputs, plan: Plan, config: ForwardSm80Config, workers: int
) -> Launch[Variant]:
    """Schedule the call and fill in the argument.

    Args:
        inputs: the call.
        plan: of the call, with the config's block sizes.
        config: feasible for it.
        workers: blocks that run at once on the device.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    batch, num_heads, _, head_dim = query.shape
    head_dim_v, heads = value.shape[3], batch * num_heads
    schedule = plan.schedule(
        batch=batch, num_heads=num_heads, workers=workers, head_dim_v=head_dim_v
    )
    terms = inputs.softcap != 0, inputs.alibi_slopes is not None, inputs.bias is not None
    aligned = all(is_aligned(tensor) for tensor in (query, key, value, inputs.output))
    variant = configs.variant(
        DTYPE_NAMES[query.dtype], head_dim, head_dim_v, aligned, terms, config
    )
    on_device = to_device(plan, schedule, query.device)
    values = input_values(inputs) | plan_values(plan, schedule, on_device)
    values["head_group"] = min(config.head_group, heads)
    return Launch(
        variant,
        schedule,
        on_device,
        values,
        heads,
        plan.num_passes,
        scratch_sizes(plan, schedule, heads, head_dim_v),
        heads * schedule.num_counters,
        renewal_of(plan, schedule),
    )


def is_aligned(tensor: torch.Tensor) -> bool:
    """Every row starts at a multiple of 16 bytes. Strides of size-1 dimensions are never used."""
    unit = 16 // tensor.element_size()
    strides = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return tensor.data_ptr() % 16 == 0 and all(
        size == 1 or stride % unit == 0 for size, stride in strides
    )


def scratch_sizes(
    plan: Plan, schedule: Schedule, heads: int, head_dim_v: int
) -> tuple[int, int, int, int]:
    """Floats of piece_output, piece_lse, running_output and running_lse; see `Launch`."""
    slots = heads * schedule.num_slots * plan.block_q
    rows = heads * plan.seqlen_q if plan.num_passes > 1 else 0
    slots_out, slots_lse, rows_out, rows_lse = (
        -(-count // 4) * 4 for count in (slots * head_dim_v, slots, rows * head_dim_v, rows)
    )
    return slots_out, slots_lse, rows_out, rows_lse


def input_values(inputs: AttentionInputs) -> dict[str, int | float]:
    """Fields of a kernel's argument that follow from the call's tensors and options alone."""
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
        "scale_log2": scale * LOG2_E,
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


def plan_values(
    plan: Plan,
    schedule: Schedule,
    on_device: tuple[DevicePlan, DeviceSchedule],
) -> dict[str, int | float]:
    """Fields of a kernel's argument that follow from the plan and its schedule."""
    names = ("tiles", "bits", "bit_ranges", "layouts", "layout_ids", "q_ids", "k_ids")
    values: dict[str, int | float] = {name: on_device[0].address(name) for name in names}
    scratch = ("piece_output", "piece_lse", "counters", "running_output", "running_lse")
    values |= dict.fromkeys(scratch, 0)
    return values | {
        "full_list": on_device[1].address("full_list"),
        "layout_batch": plan.layout_batch,
        "layout_heads": plan.layout_heads,
        "num_slots": schedule.num_slots,
        "num_counters": schedule.num_counters,
    }
