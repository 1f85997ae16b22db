"""Calls for masks of a kind that was seen: a launch of which only the plan's numbers are new.

Most plans have one pass and one layout, no steps, no id tiles and no rows that are cut. Whatever
their masks, launches for them on tensors of equal metadata differ in the addresses of the plan's
and the schedule's arrays, the number of items, and the blocks that take them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from portattn.plan import plan_mask, to_device

if TYPE_CHECKING:
    import torch

    from portattn.masks import Mask
    from portattn.plan import DevicePlan, DeviceSchedule, Plan, Schedule

# Arrays whose addresses launches hold, by the names of `Launch.fields`; beside them there are
# ``num_items`` and ``num_work``: the items of all heads.
PLAN_ARRAYS = ("tiles", "bits", "bit_ranges", "layouts", "layout_ids", "q_ids", "k_ids")
SCHEDULE_ARRAYS = ("items", "full_list")
MOST_BLOCKS = (1 << 31) - 1  # of a grid's first dimension
# By the names of the parameters of Triton's kernels.
PARAMETERS = {f"{name}_ptr": name for name in (*PLAN_ARRAYS, *SCHEDULE_ARRAYS)} | {
    "ranges_ptr": "bit_ranges",
    "num_items": "num_items",
}


class Renewal(NamedTuple):
    """What a plan and a schedule were made with, beside the mask and lengths.

    Attributes:
        block_q, block_k: of the plan.
        schedule: arguments of `Plan.schedule`, in order.
    """

    block_q: int
    block_k: int
    schedule: tuple[int, ...]


class Renewed(NamedTuple):
    """A plan and its schedule on a device.

    Attributes:
        plan: of the new mask.
        on_device: its and its schedule's arrays.
        numbers: what launches have of them, by name.
    """

    plan: Plan
    on_device: tuple[DevicePlan, DeviceSchedule]
    numbers: dict[str, int]


def renewal_of(plan: Plan, schedule: Schedule) -> Renewal | None:
    """How to plan other masks for the same launches; None where launches hold more of a plan."""
    if not _is_plain(plan, schedule):
        return None
    return Renewal(plan.block_q, plan.block_k, schedule.arguments)


def _is_plain(plan: Plan, schedule: Schedule) -> bool:
    return (
        plan.num_passes == 1
        and plan.num_layouts == 1
        and plan.num_id_rows == 0
        and schedule.num_slots == 0
        and not plan.has_steps
    )


def plan_again(
    renewal: Renewal,
    mask: Mask | None,
    q_offset: int,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device,
) -> Renewed | None:
    """Plan another mask and bring the plan to the device; None if launches for it differ in more.

    Raises:
        MaskError: the mask does not fit the lengths, or a CUDA graph is being captured.
    """
    batch, num_heads = renewal.schedule[:2]
    plan = plan_mask(
        mask,
        batch=batch,
        num_heads=num_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        q_offset=q_offset,
        block_q=renewal.block_q,
        block_k=renewal.block_k,
    )
    schedule = plan.schedule_with(renewal.schedule)
    if not _is_plain(plan, schedule):
        return None
    on_device = to_device(plan, schedule, device)
    numbers = {name: on_device[0].address(name) for name in PLAN_ARRAYS}
    for name in SCHEDULE_ARRAYS:
        numbers[name] = on_device[1].address(name)
    numbers["num_items"] = schedule.num_items
    numbers["num_work"] = schedule.num_items * batch * num_heads
    return Renewed(plan, on_device, numbers)
