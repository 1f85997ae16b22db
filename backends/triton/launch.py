"""Launches of the forward kernel for a call, its plan and its schedule: one per pass."""

from __future__ import annotations

import collections
import threading
from typing import TYPE_CHECKING

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from portattn.backends.triton.forward_kernel import forward_kernel
from portattn.backends.triton.geometry import pass_launches
from portattn.backends.triton.limits import next_power_of_2

if TYPE_CHECKING:
    from portattn.backends.base import AttentionInputs
    from portattn.backends.triton.config import TritonForwardConfig
    from portattn.backends.triton.geometry import Layout
    from portattn.plan import Plan, Schedule

_MAX_COUNTER_STREAMS = 16

_counters: collections.OrderedDict[tuple[torch.device, int], torch.Tensor] = (
    collections.OrderedDict()
)
_counters_lock = threading.Lock()


def arrival_counters(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros, this stream's own; a launch leaves them at zero.

    Kept for the last 16 streams. A CUDA graph gets its own: it may be replayed on any stream.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (device, stream)
    with _counters_lock:
        found = _counters.get(key)
        if found is None or found.numel() < count:
            found = torch.zeros(next_power_of_2(count), dtype=torch.int32, device=device)
            _counters[key] = found
            while len(_counters) > _MAX_COUNTER_STREAMS:
                _counters.popitem(last=False)
        _counters.move_to_end(key)
        return found


def _descriptor(
    tensor: torch.Tensor, layout: Layout | None, rows: int, width: int
) -> TensorDescriptor | None:
    if layout is None:
        return None
    return TensorDescriptor(tensor, *layout, [1, 1, rows, width])


def launch_forward(
    inputs: AttentionInputs, plan: Plan, schedule: Schedule, config: TritonForwardConfig
) -> None:
    """Launch every pass on the tensors' device and current stream.

    The tensors may be on the CPU where Triton's interpreter runs the kernel.
    """
    query, key, value, output = inputs.query, inputs.key, inputs.value, inputs.output
    if output.numel() == 0:
        return
    launches = pass_launches(inputs, plan, schedule, config)
    device, heads = query.device, query.shape[0] * query.shape[1]
    block_dv = launches[0].variant.block_dv
    plan_on, schedule_on = plan.to(device), schedule.to(device)
    slots_out = slots_lse = counters = running_out = running_lse = None
    if schedule.num_slots > 0:
        slot_rows = heads * schedule.num_slots * config.block_q
        slots_out = torch.empty((slot_rows, block_dv), dtype=torch.float32, device=device)
        slots_lse = torch.empty(slot_rows, dtype=torch.float32, device=device)
        counters = arrival_counters(device, heads * schedule.num_counters)
    if len(launches) > 1:
        running_rows = heads * query.shape[2]
        running_out = torch.empty((running_rows, block_dv), dtype=torch.float32, device=device)
        running_lse = torch.empty(running_rows, dtype=torch.float32, device=device)
    for launch in launches:
        variant = launch.variant
        tma, ids = variant.tma, variant.ids
        forward_kernel[launch.grid](
            query,
            key,
            value,
            _descriptor(key, launch.key_layout, config.block_k, variant.block_d) if tma else None,
            _descriptor(value, launch.value_layout, config.block_k, block_dv) if tma else None,
            output,
            inputs.lse,
            running_out,
            running_lse,
            slots_out,
            slots_lse,
            counters,
            schedule_on.items,
            schedule_on.full_list,
            plan_on.tiles,
            plan_on.bits,
            plan_on.layouts,
            plan_on.layout_ids if ids else None,
            plan_on.q_ids if ids else None,
            plan_on.k_ids if ids else None,
            inputs.alibi_slopes,
            inputs.bias,
            inputs.sinks,
            *launch.integers,
            inputs.scale,
            inputs.softcap,
            *launch.constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
