"""Launches of the forward kernel for a call, its plan and its schedule: one per pass."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from portattn.backends.renewal import MOST_BLOCKS, renewal_of
from portattn.backends.repeated import (
    BIAS,
    COUNTERS,
    KEY,
    LSE,
    OUTPUT,
    QUERY,
    SINKS,
    SLOPES,
    VALUE,
)
from portattn.backends.stream_memory import arrival_counters
from portattn.backends.triton.fast_launch import (
    KeptCall,
    RepeatedLaunch,
    repeated_call,
    scratch_sources,
)
from portattn.backends.triton.forward_kernel import forward_kernel
from portattn.backends.triton.geometry import pass_launches
from portattn.plan import to_device

if TYPE_CHECKING:
    from portattn.backends.base import AttentionInputs
    from portattn.backends.repeated import RepeatedCall
    from portattn.backends.triton.config import TritonForwardConfig
    from portattn.backends.triton.fast_launch import Describe
    from portattn.backends.triton.geometry import Layout, PassLaunch
    from portattn.plan import DevicePlan, DeviceSchedule, Plan, Schedule


class ForwardCall(KeptCall):
    """One kind of call, ready to be repeated (`repeated.call_key`). Thread-safe.

    It holds the device's arrays of the plan and the schedule, and neither of the two, which may
    hold it in turn.
    """

    def __init__(
        self, inputs: AttentionInputs, plan: Plan, schedule: Schedule, config: TritonForwardConfig
    ) -> None:
        """Work out every pass; nothing is launched yet.

        The tensors may be on the CPU where Triton's interpreter runs the kernel.
        """
        device, heads = inputs.query.device, inputs.query.shape[0] * inputs.query.shape[1]
        launches = pass_launches(inputs, plan, schedule, config)
        self._on_device = to_device(plan, schedule, device)
        self._renewal = renewal_of(plan, schedule)
        block_dv = launches[0].variant.block_dv
        slots = heads * schedule.num_slots * config.block_q
        rows = heads * inputs.query.shape[2] if len(launches) > 1 else 0
        # Floats of slots_out, slots_lse, running_out and running_lse; multiples of 16 bytes.
        self._sizes = [
            -(-count // 4) * 4 for count in (slots * block_dv, slots, rows * block_dv, rows)
        ]
        self._num_counters = heads * schedule.num_counters if slots else 0
        self._launches = [
            _repeated(inputs, launch, self._on_device, config, pieces=slots > 0, passes=rows > 0)
            for launch in launches
        ]

    def run(self, inputs: AttentionInputs) -> bool:
        """Launch every pass on the inputs' device, which is the current one, and current stream.

        Returns:
            Whether a CUDA graph was being captured: then the plan must be kept.
        """
        done = self.repeat(inputs)
        if done is not None:
            return done
        plan_on, schedule_on = self._on_device
        capturing = plan_on.use()
        schedule_on.use()
        tensors = [inputs.query, inputs.key, inputs.value, inputs.output]
        optional = (inputs.lse, inputs.alibi_slopes, inputs.bias, inputs.sinks)
        tensors += [tensor for tensor in optional if tensor is not None]
        if any(self._sizes):
            device = inputs.query.device
            memory = torch.empty(sum(self._sizes), dtype=torch.float32, device=device)
            parts = torch.split(memory, self._sizes)
            tensors += [part for part in parts if part.numel()]
            if self._num_counters:
                tensors.append(arrival_counters(device, self._num_counters))
        for launch, uses_key_twice in self._launches:
            launch([*tensors, inputs.key, inputs.value] if uses_key_twice else tensors)
        self.repeated = self._repeated(inputs)
        return capturing

    def _repeated(self, inputs: AttentionInputs) -> RepeatedCall | None:
        """See `fast_launch.repeated_call`; the sources are in `run`'s order."""
        terms = (
            (inputs.lse, LSE),
            (inputs.alibi_slopes, SLOPES),
            (inputs.bias, BIAS),
            (inputs.sinks, SINKS),
        )
        sources = [(QUERY, 0), (KEY, 0), (VALUE, 0), (OUTPUT, 0)]
        sources += [(source, 0) for tensor, source in terms if tensor is not None]
        sources += scratch_sources(self._sizes)
        sources += [(COUNTERS, 0)] if self._num_counters else []
        return repeated_call(
            [
                (launch, [*sources, (KEY, 0), (VALUE, 0)] if uses_key_twice else sources)
                for launch, uses_key_twice in self._launches
            ],
            inputs.query.device,
            on_device=self._on_device,
            scratch_floats=sum(self._sizes),
            num_counters=self._num_counters,
            renewal=self._renewal,
        )


def _descriptor(layout: Layout, rows: int, width: int, tensor: torch.Tensor) -> TensorDescriptor:
    return TensorDescriptor(tensor, *layout, [1, 1, rows, width])


def _repeated(
    inputs: AttentionInputs,
    launch: PassLaunch,
    on_device: tuple[DevicePlan, DeviceSchedule],
    config: TritonForwardConfig,
    *,
    pieces: bool,
    passes: bool,
) -> tuple[RepeatedLaunch, bool]:
    """A pass's launch, and whether it takes key and value once more, as descriptors.

    The tensors that move are in `ForwardCall.run`'s order.
    """
    plan_on, schedule_on = on_device
    variant = launch.variant
    names = ["q_ptr", "k_ptr", "v_ptr", "out_ptr"]
    optional = (
        (inputs.lse is not None, ("lse_ptr",)),
        (inputs.alibi_slopes is not None, ("slopes_ptr",)),
        (inputs.bias is not None, ("bias_ptr",)),
        (inputs.sinks is not None, ("sinks_ptr",)),
        (pieces, ("slots_out_ptr", "slots_lse_ptr")),
        (passes, ("running_out_ptr", "running_lse_ptr")),
        (pieces, ("counters_ptr",)),
    )
    for is_there, more in optional:
        names += more if is_there else ()
    moving: dict[str, Describe | None] = dict.fromkeys(names)
    layouts = (
        ("k_desc", launch.key_layout, variant.block_d),
        ("v_desc", launch.value_layout, variant.block_dv),
    )
    for name, layout, width in layouts:
        if variant.tma and layout is not None:
            moving[name] = functools.partial(_descriptor, layout, config.block_k, width)
    fixed: dict[str, object] = {
        "items_ptr": schedule_on.items,
        "full_list_ptr": schedule_on.full_list,
        "tiles_ptr": plan_on.tiles,
        "bits_ptr": plan_on.bits,
        "layouts_ptr": plan_on.layouts,
    }
    if variant.ids:
        ids = {name: getattr(plan_on, name) for name in ("layout_ids", "q_ids", "k_ids")}
        fixed |= {f"{name}_ptr": tensor for name, tensor in ids.items()}
    arguments = [
        *(fixed.get(name) for name in POINTERS),
        *launch.integers,
        inputs.scale,
        inputs.softcap,
        *launch.constants,
    ]
    made = RepeatedLaunch(
        forward_kernel,
        launch.grid,
        arguments,
        {POINTERS.index(name): describe for name, describe in moving.items()},
        {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        },
        inputs.query.device,
        MOST_BLOCKS,
    )
    return made, "k_desc" in moving


# The kernel's first parameters, all addresses but for the two descriptors.
POINTERS = (
    "q_ptr", "k_ptr", "v_ptr", "k_desc", "v_desc", "out_ptr", "lse_ptr", "running_out_ptr",
    "running_lse_ptr", "slots_out_ptr", "slots_lse_ptr", "counters_ptr", "items_ptr",
    "full_list_ptr", "tiles_ptr", "bits_ptr", "layouts_ptr", "layout_ids_ptr", "q_ids_ptr",
    "k_ids_ptr", "slopes_ptr", "bias_ptr", "sinks_ptr",
)  # fmt: skip


def launch_forward(
    inputs: AttentionInputs, plan: Plan, schedule: Schedule, config: TritonForwardConfig
) -> None:
    """Compute one call that is not going to be repeated."""
    if inputs.output.numel() == 0:
        return
    ForwardCall(inputs, plan, schedule, config).run(inputs)
