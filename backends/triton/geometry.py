"""What a call's sizes and strides fix about its launches: worked out once, kept by plan."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from portattn.backends.triton.limits import device_limits
from portattn.backends.triton.variant import PassShape, Variant, make_variant

if TYPE_CHECKING:
    import torch

    from portattn.backends.base import AttentionInputs
    from portattn.backends.triton.config import TritonForwardConfig
    from portattn.plan import Plan, Schedule

_VECTOR_BYTES = 16
# Sizes and strides of a tensor descriptor.
Layout = tuple[list[int], list[int]]


@dataclasses.dataclass(frozen=True, slots=True)
class PassLaunch:
    """One launch but for its pointers.

    Attributes:
        grid: number of programs.
        variant: the compile-time side.
        key_layout, value_layout: of the descriptors; None where the variant reads by pointers.
        integers: the kernel's integer arguments, in order.
        constants: the variant's values, in order.
    """

    grid: int
    variant: Variant
    key_layout: Layout | None
    value_layout: Layout | None
    integers: tuple[int, ...]
    constants: tuple[int | bool | str, ...]


def pass_launches(
    inputs: AttentionInputs, plan: Plan, schedule: Schedule, config: TritonForwardConfig
) -> tuple[PassLaunch, ...]:
    """The launches of a call, one per pass.

    They depend on nothing of the inputs that is not in `repeated.call_key`.
    """
    query, key, value, output = inputs.query, inputs.key, inputs.value, inputs.output
    device = query.device
    arch = device_limits(str(device)).arch if device.type == "cuda" else "interpreter"
    vector = vector_elements((query, key, value, output))
    launches = []
    for index in range(plan.num_passes):
        shape = pass_shape(plan, schedule, index)
        key_layout = value_layout = None
        if config.tma and not shape.stepped:
            key_layout, value_layout = (descriptor_layout(x, vector) for x in (key, value))
        variant = make_variant(
            inputs,
            config,
            shape,
            arch=arch,
            vector=vector,
            tma=key_layout is not None and value_layout is not None,
            pieces=schedule.num_slots > 0,
            first=index == 0,
            last=index == plan.num_passes - 1,
        )
        launches.append(
            PassLaunch(
                shape.num_items * query.shape[0] * query.shape[1],
                variant,
                key_layout,
                value_layout,
                _integers(inputs, plan, schedule, config, shape, vector),
                variant.values(),
            )
        )
    return tuple(launches)


def _integers(
    inputs: AttentionInputs,
    plan: Plan,
    schedule: Schedule,
    config: TritonForwardConfig,
    shape: PassShape,
    vector: int,
) -> tuple[int, ...]:
    """The kernel's integer arguments from q_stride_b to num_counters."""
    batch, num_heads, seqlen_q, _ = inputs.query.shape
    num_kv_heads, seqlen_k = inputs.key.shape[1:3]
    return (
        *strides_of(inputs.query, 3, vector),
        *strides_of(inputs.key, 3, vector),
        *strides_of(inputs.value, 3, vector),
        *strides_of(inputs.output, 3, vector),
        *strides_of(inputs.lse, 3),
        *slope_strides(inputs.alibi_slopes),
        *strides_of(inputs.bias, 4),
        plan.layout_heads if plan.layout_batch > 1 else 0,
        1 if plan.layout_heads > 1 else 0,
        plan.num_layouts,
        shape.first_item,
        shape.num_items,
        batch * num_heads,
        num_heads,
        num_heads // num_kv_heads,
        config.head_group,
        seqlen_q,
        seqlen_k,
        inputs.q_offset,
        schedule.num_slots,
        schedule.num_counters,
    )


def pass_shape(plan: Plan, schedule: Schedule, index: int) -> PassShape:
    """Which items a pass has, and which kinds of tiles occur in it."""
    items = int(schedule.item_ptr[index]), int(schedule.items_per_pass[index])
    if not plan.has_steps and plan.num_id_rows == 0:
        return PassShape(*items, stepped=False, ids=False)
    first, last = (int(plan.row_ptr[(index + i) * plan.num_layouts]) for i in (0, 1))
    rows = plan.rows[first:last]
    stepped = ids = False
    if len(rows):
        # Rows may share entries; the span from the first to the last is a safe superset.
        tiles = plan.tiles[int(rows[:, 2].min()) : int(rows[:, 3].max())]
        runs = plan.runs[int(rows[:, 4].min()) : int(rows[:, 5].max())]
        stepped = bool((tiles[:, 1] != 1).any() or (runs[:, 1] != 1).any())
        ids = bool((tiles[:, 2] != tiles[:, 3]).any())
    return PassShape(*items, stepped, ids)


def vector_elements(tensors: tuple[torch.Tensor, ...]) -> int:
    """Elements in 16 bytes if every row of every tensor starts at a multiple of them, else 1."""
    vector = _VECTOR_BYTES // tensors[0].element_size()
    for tensor in tensors:
        if tensor.data_ptr() % _VECTOR_BYTES:
            return 1
        sizes, strides = tensor.shape, tensor.stride()
        for dim in (0, 1, 2):
            if strides[dim] % vector and sizes[dim] > 1:
                return 1
    return vector


def descriptor_layout(tensor: torch.Tensor, vector: int) -> Layout | None:
    """Sizes and strides of a descriptor of [batch, heads, rows, width], per head.

    None where the copy engine cannot read: it needs 16-byte aligned rows (`vector` > 1), and
    strides that are not 0.
    """
    sizes, strides = list(tensor.shape), list(tensor.stride())
    if vector == 1 or 0 in sizes:
        return None
    # The stride of a dimension of one element is never used, but the driver must take it.
    span = max(size * stride for size, stride in zip(sizes, strides, strict=True))
    for dim in (0, 1, 2):
        if sizes[dim] == 1:
            strides[dim] = -(-span // vector) * vector
        elif strides[dim] == 0:
            return None
    return sizes, strides


def strides_of(tensor: torch.Tensor | None, count: int, unit: int = 1) -> tuple[int, ...]:
    """The first `count` strides in units of `unit` elements, 0 for dimensions of one element."""
    if tensor is None:
        return (0,) * count
    sizes, strides = tensor.shape, tensor.stride()
    return tuple(strides[i] // unit if sizes[i] > 1 else 0 for i in range(count))


def slope_strides(slopes: torch.Tensor | None) -> tuple[int, int]:
    """Batch and head strides of slopes [num_heads] or [batch, num_heads]."""
    if slopes is None:
        return 0, 0
    if slopes.ndim == 1:
        return 0, slopes.stride(0)
    return slopes.stride(0), slopes.stride(1)
