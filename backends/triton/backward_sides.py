"""What the launches of the plain Triton backward share: plans, schedules, arguments."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from portattn.backends.repeated import plan_of
from portattn.backends.triton.backward_config import block_width, shape_of, workers_of
from portattn.backends.triton.fast_launch import RepeatedLaunch
from portattn.backends.triton.geometry import pass_shape, slope_strides, strides_of
from portattn.backends.triton.limits import device_limits
from portattn.backends.triton.variant import TCGEN05
from portattn.plan import to_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.backends.base import AttentionInputs
    from portattn.backends.triton.backward_config import TritonBackwardConfig
    from portattn.backends.triton.fast_launch import Describe
    from portattn.backends.triton.variant import PassShape
    from portattn.plan import DevicePlan, DeviceSchedule


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """One of the two main kernels with the plan that it walks.

    Attributes:
        part: ``"column"`` or ``"row"``.
        passes: what the tiles of each pass of its plan are like.
        plan_on, schedule_on: arrays on the device.
        num_heads: heads of the programs: KV heads for columns, query heads for rows.
        layout_strides: batch and head strides of the plan's layouts.
        num_layouts, num_slots, num_counters: of the plan and of the schedule.
        slot_floats: memory for the slots of all heads.
    """

    part: str
    passes: tuple[PassShape, ...]
    plan_on: DevicePlan
    schedule_on: DeviceSchedule
    num_heads: int
    layout_strides: tuple[int, int]
    num_layouts: int
    num_slots: int
    num_counters: int
    slot_floats: int


def make_side(
    part: str, inputs: AttentionInputs, config: TritonBackwardConfig, workers: int | None
) -> Side:
    """Plan and schedule one side; workers None asks the device."""
    device = inputs.query.device
    block_q, block_k = getattr(config, f"{part}_block_q"), getattr(config, f"{part}_block_k")
    plan = plan_of(inputs, block_q, block_k)
    is_column = part == "column"
    if is_column:
        plan = plan.transpose()
    head_dim, head_dim_v = inputs.query.shape[3], inputs.value.shape[3]
    if workers is None:
        size = inputs.query.element_size()
        limits = device_limits(str(device))
        workers = workers_of(config, part, head_dim, head_dim_v, size, limits)
    width = block_width(head_dim) + (block_width(head_dim_v) if is_column else 0)
    batch, heads = inputs.query.shape[0], (inputs.key if is_column else inputs.query).shape[1]
    schedule = plan.schedule(
        batch=batch, num_heads=heads, workers=workers, head_dim_v=width, min_piece=config.min_piece
    )
    rows = block_k if is_column else block_q
    return Side(
        part,
        tuple(pass_shape(plan, schedule, index) for index in range(plan.num_passes)),
        *to_device(plan, schedule, device),
        heads,
        (plan.layout_heads if plan.layout_batch > 1 else 0, 1 if plan.layout_heads > 1 else 0),
        plan.num_layouts,
        schedule.num_slots,
        schedule.num_counters,
        batch * heads * schedule.num_slots * rows * (width + 1),
    )


def add_strides(
    values: dict[str, Any], name: str, tensor: torch.Tensor | None, unit: int = 1
) -> None:
    """Batch, head and row strides of a tensor among the arguments, in units of elements."""
    strides = strides_of(tensor, 3, unit)
    values |= {f"{name}_stride_{x}": stride for x, stride in zip("bhs", strides, strict=True)}


def shared_values(
    inputs: AttentionInputs,
    seed: torch.Tensor,
    side: Side,
    shape: PassShape,
    config: TritonBackwardConfig,
    vector: int,
) -> dict[str, Any]:
    """The run-time arguments that both main kernels take, for one pass, by name."""
    batch, num_heads, seqlen_q, _ = inputs.query.shape
    group = num_heads // inputs.key.shape[1]
    values: dict[str, Any] = {
        "tiles_ptr": side.plan_on.tiles,
        "bits_ptr": side.plan_on.bits,
        "layouts_ptr": side.plan_on.layouts,
        "items_ptr": side.schedule_on.items,
        "full_list_ptr": side.schedule_on.full_list,
        "layout_stride_b": side.layout_strides[0],
        "layout_stride_h": side.layout_strides[1],
        "num_layouts": side.num_layouts,
        "first_item": shape.first_item,
        "num_items": shape.num_items,
        "num_bh": batch * side.num_heads,
        "num_heads": num_heads,
        "group_size": group,
        "head_group": config.head_group * (1 if side.part == "column" else group),
        "seqlen_q": seqlen_q,
        "seqlen_k": inputs.key.shape[2],
        "q_offset": inputs.q_offset,
        "num_slots": side.num_slots,
        "num_counters": side.num_counters,
        "first": 0,
        "count": group if side.part == "column" else num_heads,
        "first_batch": 0,
    }
    if shape.ids:
        ids = {name: getattr(side.plan_on, name) for name in ("layout_ids", "q_ids", "k_ids")}
        values |= {f"{name}_ptr": tensor for name, tensor in ids.items()}
    for name, tensor in (
        ("q", inputs.query), ("k", inputs.key), ("v", inputs.value), ("do", seed),
    ):  # fmt: skip
        add_strides(values, name, tensor, vector)
    slopes = slope_strides(inputs.alibi_slopes)
    values["slopes_stride_b"], values["slopes_stride_h"] = slopes
    for letter, stride in zip("bhsk", strides_of(inputs.bias, 4), strict=True):
        values[f"bias_stride_{letter}"] = stride
    return values


def constants_of(
    inputs: AttentionInputs,
    part: str,
    shape: PassShape,
    config: TritonBackwardConfig,
    vector: int,
    *,
    arch: str,
    pieces: bool,
    first: bool,
    last: bool,
    sums: int,
) -> dict[str, Any]:
    """The compile-time arguments that both main kernels take, in their order."""
    head_dim, head_dim_v = inputs.query.shape[3], inputs.value.shape[3]
    return {
        "BLOCK_Q": getattr(config, f"{part}_block_q"),
        "BLOCK_K": getattr(config, f"{part}_block_k"),
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_DV": block_width(head_dim_v),
        "VECTOR": vector,
        "STEPPED": shape.stepped,
        "IDS": shape.ids,
        "PIECES": pieces,
        "FIRST": first,
        "LAST": last,
        "SOFTCAP": inputs.softcap != 0.0,
        "ALIBI": inputs.alibi_slopes is not None,
        "BIAS": inputs.bias is not None,
        "SUMS": sums,
        "PRECISION": config.precision if inputs.query.dtype == torch.float32 else "ieee",
        # Triton 3.6 and 3.9 fail an assertion when they pipeline such loops for tcgen05.
        "PARTIAL_STAGES": 1 if arch in TCGEN05 else min(2, shape_of(config, part)[3]),
    }


def _is_number(parameter: str) -> bool:
    return not parameter.endswith(("_ptr", "_desc", "_long", "_short"))


class NamedLaunch:
    """One launch whose moving tensors are looked up by name."""

    def __init__(
        self,
        kernel: Any,  # noqa: ANN401
        parameters: Sequence[str],
        values: Mapping[str, Any],
        constants: Sequence[Any],
        moving: Mapping[str, str],
        grid: int,
        options: Mapping[str, Any],
        device: torch.device,
        describe: Mapping[str, Describe] | None = None,
    ) -> None:
        """Nothing is launched yet.

        Args:
            kernel: a triton.jit function.
            parameters: names of its run-time parameters, in order, without scalars of `constants`.
            values: arguments by name; addresses that are missing are None.
            constants: what follows `parameters`.
            moving: parameter -> name of the tensor that it takes.
            grid: programs.
            options: num_warps and num_stages.
            device: of the tensors.
            describe: parameter -> what makes the descriptor that it takes of its tensor.
        """
        how = describe or {}
        self._names = tuple(moving.values())
        self._launch = RepeatedLaunch(
            kernel,
            grid,
            [
                *(values[name] if _is_number(name) else values.get(name) for name in parameters),
                *constants,
            ],
            {list(parameters).index(name): how.get(name) for name in moving},
            {**options, "enable_fp_fusion": True},
            device,
        )

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Launch on the current stream."""
        self._launch([tensors[name] for name in self._names])
