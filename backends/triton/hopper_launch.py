"""Launches of the Hopper forward for a call, its plan and its schedule: one per pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from portattn.backends.renewal import renewal_of
from portattn.backends.repeated import (
    COUNTERS,
    KEY,
    LSE,
    OUTPUT,
    QUERY,
    SINKS,
    SLOPES,
    VALUE,
    call_key,
)
from portattn.backends.stream_memory import arrival_counters
from portattn.backends.triton.fast_launch import (
    KeptCall,
    RepeatedLaunch,
    repeated_call,
    scratch_sources,
)
from portattn.backends.triton.geometry import slope_strides, strides_of
from portattn.backends.triton.hopper_config import CONSUMER_ROWS, block_width
from portattn.backends.triton.hopper_kernel import hopper_forward
from portattn.backends.triton.hopper_maps import (
    aligned_like,
    is_readable,
    long_residues,
    pass_maps,
    readable,
)
from portattn.backends.triton.hopper_variant import compile_options, make_variant, pass_of
from portattn.backends.triton.limits import device_limits
from portattn.plan import to_device

if TYPE_CHECKING:
    from collections.abc import Hashable

    from portattn.backends.base import AttentionInputs, Kernel
    from portattn.backends.repeated import RepeatedCall
    from portattn.backends.triton.fast_launch import Describe
    from portattn.backends.triton.hopper_config import TritonForwardHopperConfig
    from portattn.backends.triton.hopper_variant import HopperPass, HopperVariant
    from portattn.plan import DevicePlan, DeviceSchedule, Plan, Schedule

# The kernel's first parameters: descriptors, then addresses.
_POINTERS = (
    "q_desc", "q_short", "k_desc", "k_long", "k_short", "v_desc", "v_long", "v_short", "out_desc",
    "out_short", "out_ptr", "lse_ptr", "running_out_ptr", "running_lse_ptr", "slots_out_ptr",
    "slots_lse_ptr", "counters_ptr", "items_ptr", "full_list_ptr", "tiles_ptr", "bits_ptr",
    "ranges_ptr", "layouts_ptr", "layout_ids_ptr", "q_ids_ptr", "k_ids_ptr", "slopes_ptr",
    "sinks_ptr",
)  # fmt: skip


def _integers(
    inputs: AttentionInputs,
    plan: Plan,
    schedule: Schedule,
    config: TritonForwardHopperConfig,
    shape: HopperPass,
) -> tuple[int, ...]:
    """The kernel's integer arguments, lse_stride_b to k_residues."""
    batch, num_heads, seqlen_q, _ = inputs.query.shape
    num_kv_heads, seqlen_k = inputs.key.shape[1:3]
    return (
        *strides_of(inputs.lse, 3),
        *slope_strides(inputs.alibi_slopes),
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
        long_residues(seqlen_q, shape.q_step),
        long_residues(seqlen_k, shape.k_step),
    )


_LETTERS = {"q": QUERY, "k": KEY, "v": VALUE, "o": OUTPUT}


def hopper_key(
    kernel: Kernel, inputs: AttentionInputs, config: TritonForwardHopperConfig
) -> Hashable:
    """`repeated.call_key`, and which tensors TMA reads: tensor maps have the strides of copies."""
    tensors = (inputs.query, inputs.key, inputs.value, inputs.output)
    return call_key(kernel, inputs, config), tuple([is_readable(tensor) for tensor in tensors])


class HopperCall(KeptCall):
    """One kind of call, ready to be repeated (`hopper_key`). Thread-safe.

    It holds the device's arrays of the plan and the schedule, and neither of the two, which may
    hold it in turn.
    """

    def __init__(
        self,
        inputs: AttentionInputs,
        plan: Plan,
        schedule: Schedule,
        config: TritonForwardHopperConfig,
    ) -> None:
        """Work out every pass; nothing is launched yet."""
        device, heads = inputs.query.device, inputs.query.shape[0] * inputs.query.shape[1]
        self._on_device = to_device(plan, schedule, device)
        self._renewal = renewal_of(plan, schedule)
        block_dv = block_width(inputs.value.shape[3])
        passes = plan.num_passes
        slots = heads * schedule.num_slots * config.block_q
        rows = heads * inputs.query.shape[2] if passes > 1 else 0
        # Floats of slots_out, slots_lse, running_out and running_lse; multiples of 16 bytes.
        self._sizes = [
            -(-count // 4) * 4 for count in (slots * block_dv, slots, rows * block_dv, rows)
        ]
        # One for the work that programs take; one for each consumer of a row tile that was cut,
        # for they merge on their own.
        consumers = config.block_q // CONSUMER_ROWS
        self._num_counters = 1 + consumers * heads * schedule.num_counters
        self._launches = []
        for index in range(passes):
            shape = pass_of(plan, schedule, index)
            variant = make_variant(
                inputs,
                config,
                shape,
                pieces=slots > 0,
                first=index == 0,
                last=index == passes - 1,
            )
            integers = _integers(inputs, plan, schedule, config, shape)
            # Programs stay: one item's end runs beside the next one's first loads.
            most = device_limits(str(device)).num_sms
            self._launches.append(
                _repeated(
                    inputs,
                    variant,
                    integers,
                    (min(shape.num_items * heads, most), most),
                    pass_maps(inputs, config, shape),
                    self._on_device,
                    pieces=slots > 0,
                    passes=rows > 0,
                )
            )

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
        query, key, value = (readable(x) for x in (inputs.query, inputs.key, inputs.value))
        output = inputs.output if is_readable(inputs.output) else aligned_like(inputs.output)
        by_letter = {"q": query, "k": key, "v": value, "o": output}
        more = [x for x in (inputs.lse, inputs.alibi_slopes, inputs.sinks) if x is not None]
        if any(self._sizes):
            device = query.device
            memory = torch.empty(sum(self._sizes), dtype=torch.float32, device=device)
            more += [part for part in torch.split(memory, self._sizes) if part.numel()]
        more.append(arrival_counters(query.device, self._num_counters))
        for launch, letters in self._launches:
            launch([*(by_letter[letter] for letter in letters), *more])
        if output is not inputs.output:
            inputs.output.copy_(output)
        # Where nothing had to be copied; whether it had is the same for all calls of the kind.
        given = (inputs.query, inputs.key, inputs.value, inputs.output)
        if all(x is y for x, y in zip((query, key, value, output), given, strict=True)):
            self.repeated = self._repeated(inputs)
        return capturing

    def _repeated(self, inputs: AttentionInputs) -> RepeatedCall | None:
        """See `fast_launch.repeated_call`; the sources are in `run`'s order."""
        terms = ((inputs.lse, LSE), (inputs.alibi_slopes, SLOPES), (inputs.sinks, SINKS))
        more = [(source, 0) for tensor, source in terms if tensor is not None]
        more += scratch_sources(self._sizes)
        more += [(COUNTERS, 0)]
        return repeated_call(
            [
                (launch, [*((_LETTERS[letter], 0) for letter in letters), *more])
                for launch, letters in self._launches
            ],
            inputs.query.device,
            on_device=self._on_device,
            scratch_floats=sum(self._sizes),
            num_counters=self._num_counters,
            renewal=self._renewal,
        )


def _repeated(
    inputs: AttentionInputs,
    variant: HopperVariant,
    integers: tuple[int, ...],
    programs: tuple[int, int],
    maps: dict[str, Describe],
    on_device: tuple[DevicePlan, DeviceSchedule],
    *,
    pieces: bool,
    passes: bool,
) -> tuple[RepeatedLaunch, str]:
    """A pass's launch, and the first letters of the tensors that it reads and writes.

    Of `programs` the first number is the pass's, the second the most of any. The tensors that move
    are in `HopperCall.run`'s order.
    """
    plan_on, schedule_on = on_device
    optional = (
        (inputs.lse is not None, ("lse_ptr",)),
        (inputs.alibi_slopes is not None, ("slopes_ptr",)),
        (inputs.sinks is not None, ("sinks_ptr",)),
        (pieces, ("slots_out_ptr", "slots_lse_ptr")),
        (passes, ("running_out_ptr", "running_lse_ptr")),
        (True, ("counters_ptr",)),
    )
    of_tensors: dict[str, Describe | None] = {**maps, "out_ptr": None}
    moving = dict(of_tensors)
    for is_there, names in optional:
        moving |= dict.fromkeys(names) if is_there else {}
    fixed: dict[str, Any] = {
        "items_ptr": schedule_on.items,
        "full_list_ptr": schedule_on.full_list,
        "tiles_ptr": plan_on.tiles,
        "bits_ptr": plan_on.bits,
        "ranges_ptr": plan_on.bit_ranges,
        "layouts_ptr": plan_on.layouts,
    }
    if variant.ids:
        ids = {name: getattr(plan_on, name) for name in ("layout_ids", "q_ids", "k_ids")}
        fixed |= {f"{name}_ptr": tensor for name, tensor in ids.items()}
    arguments = [
        *(fixed.get(name) for name in _POINTERS),
        *integers,
        inputs.scale,
        inputs.softcap,
        *variant.values(),
    ]
    made = RepeatedLaunch(
        hopper_forward,
        programs[0],
        arguments,
        {_POINTERS.index(name): how for name, how in moving.items()},
        compile_options(variant.block_q),
        inputs.query.device,
        programs[1],
    )
    return made, "".join(name[0] for name in of_tensors)
