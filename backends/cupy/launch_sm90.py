"""What a call passes to the sm_90a kernel: the sm_80 kernel's argument, and tensor maps."""

from __future__ import annotations

import dataclasses
import struct
from typing import TYPE_CHECKING

import numpy as np

from portattn.backends.cuda_launch import Field, Patch
from portattn.backends.cupy import config_sm90 as configs
from portattn.backends.cupy.launch import (
    DTYPE_NAMES,
    LOG2_E,
    Launch,
    input_values,
    is_aligned,
    plan_values,
    scratch_sizes,
)
from portattn.backends.cupy.tensor_map import MAP_BYTES, map_shape
from portattn.backends.renewal import MOST_BLOCKS, renewal_of
from portattn.backends.repeated import KEY, QUERY, VALUE
from portattn.errors import UnsupportedError
from portattn.plan import to_device

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from portattn.backends.base import AttentionInputs
    from portattn.backends.cupy.config_sm90 import ForwardSm90Config
    from portattn.backends.cupy.tensor_map import MapShape
    from portattn.plan import Plan, Schedule

    Encode = Callable[[int, MapShape], bytes]

_NUM_TICKETS = 2
# The kernel divides by scale * log2(e), in float32; smaller scales go to the scores instead.
_LEAST_SCALE = 1e-30
_EMPTY_MAP = bytes(MAP_BYTES)


@dataclasses.dataclass(frozen=True, slots=True)
class HopperLaunch(Launch[configs.Variant]):
    """A `Launch` with what the struct Hopper of hopper.cuh says.

    Attributes:
        config: the call's, with every field.
        steps: of each pass, its query step and the key steps above 1 of its tiles.
        workers: blocks that run at once; the grid of a persistent launch.
    """

    config: ForwardSm90Config
    steps: tuple[tuple[int, tuple[int, ...]], ...]
    workers: int

    @property
    def most_blocks(self) -> int:
        """See `Launch.most_blocks`."""
        return self.workers if self.config.persistent else MOST_BLOCKS

    def plan_fields(self) -> list[Field]:
        """See `Launch.plan_fields`."""
        work = Field(1, self._maps_bytes(), "num_work", is_address=False)
        return [*super(HopperLaunch, self).plan_fields(), work]

    def pass_params(self, index: int) -> tuple[int, bytes]:
        """Blocks to launch for a pass, and the struct Params without its scratch memory."""
        work, params = super(HopperLaunch, self).pass_params(index)
        return min(work, self.most_blocks), params

    def num_work(self, index: int) -> int:
        """Items of a pass over all heads."""
        return int(self.schedule.items_per_pass[index]) * self.heads

    def hopper_bytes(self) -> int:
        """Size of the struct Hopper, which is aligned as tensor maps are."""
        return -(-(self._maps_bytes() + 4 * (3 + self.variant.max_steps)) // 64) * 64

    def _maps_bytes(self) -> int:
        return MAP_BYTES * (2 + 2 * (1 + 2 * self.variant.max_steps))

    def hopper(
        self, inputs: AttentionInputs, index: int, encode: Encode
    ) -> tuple[bytes, list[Patch]]:
        """The struct Hopper of a pass, and which addresses its tensor maps take.

        Args:
            inputs: query, key and value readable by the copy engine.
            index: of the pass.
            encode: makes a tensor map of an address and a `MapShape`.
        """
        maps: list[bytes] = []
        patches = []

        def add(tensor: torch.Tensor, source: int, rows: int, step: int, *, ragged: bool) -> None:
            shape = map_shape(tensor, rows, step, ragged=ragged)
            if shape is not None:
                patches.append(Patch(1, MAP_BYTES * len(maps), source, is_map=True))
            maps.append(_EMPTY_MAP if shape is None else encode(tensor.data_ptr(), shape))

        query_step, key_steps = self.steps[index]
        for ragged in (False, True):
            add(inputs.query, QUERY, 64, query_step, ragged=ragged)
        unused = self.variant.max_steps - len(key_steps)
        for tensor, source in ((inputs.key, KEY), (inputs.value, VALUE)):
            add(tensor, source, self.config.block_k, 1, ragged=False)
            for step in key_steps:
                for ragged in (False, True):
                    add(tensor, source, self.config.block_k, step, ragged=ragged)
            maps += [_EMPTY_MAP] * (2 * unused)
        integers = (self.num_work(index), int(self.config.persistent), *key_steps)
        packed = b"".join(maps) + struct.pack(f"={len(integers)}i", *integers)
        return packed.ljust(self.hopper_bytes(), b"\0"), patches


def prepare(
    inputs: AttentionInputs, plan: Plan, config: ForwardSm90Config, workers: int
) -> HopperLaunch:
    """Schedule the call and fill in the arguments.

    Args:
        inputs: the call; query, key and value readable by the copy engine.
        plan: of the call, with the config's block sizes.
        config: feasible for it.
        workers: blocks that run at once on the device.
    """
    batch, num_heads, _, head_dim = inputs.query.shape
    head_dim_v, heads = inputs.value.shape[3], batch * num_heads
    schedule = plan.schedule(
        batch=batch,
        num_heads=num_heads,
        workers=workers,
        head_dim_v=head_dim_v,
        min_piece=config.min_piece,
    )
    steps = tuple(_steps_of_pass(plan, schedule, index) for index in range(plan.num_passes))
    is_scaled = inputs.scale < _LEAST_SCALE
    variant = configs.variant(
        DTYPE_NAMES[inputs.query.dtype],
        head_dim,
        head_dim_v,
        is_aligned(inputs.output),
        (inputs.softcap != 0, inputs.alibi_slopes is not None, inputs.bias is not None),
        is_scaled,
        any(key_steps for _, key_steps in steps),
        config,
    )
    on_device = to_device(plan, schedule, inputs.query.device)
    values = input_values(inputs) | plan_values(plan, schedule, on_device)
    values["head_group"] = min(config.head_group, heads)
    # This kernel leaves the query as it is: a scale below the least goes to the scores.
    values["scale_log2"] = inputs.scale * LOG2_E
    if inputs.softcap != 0:
        values["softcap_inverse"] = inputs.scale / inputs.softcap
    return HopperLaunch(
        variant,
        schedule,
        on_device,
        values,
        heads,
        plan.num_passes,
        scratch_sizes(plan, schedule, heads, head_dim_v),
        heads * schedule.num_counters + _NUM_TICKETS,
        renewal_of(plan, schedule),
        config,
        steps,
        workers,
    )


def _steps_of_pass(plan: Plan, schedule: Schedule, index: int) -> tuple[int, tuple[int, ...]]:
    """The pass's query step, and the key steps above 1 of its tiles.

    Raises:
        UnsupportedError: there are more of them than the kernel has maps for.
    """
    first, last = (int(plan.row_ptr[(index + i) * plan.num_layouts]) for i in (0, 1))
    rows = plan.rows[first:last]
    found: set[int] = set()
    if len(rows):
        # Rows may share entries; the span from the first to the last is a safe superset.
        tiles = plan.tiles[int(rows[:, 2].min()) : int(rows[:, 3].max())]
        runs = plan.runs[int(rows[:, 4].min()) : int(rows[:, 5].max())]
        found = set(np.unique(np.concatenate([tiles[:, 1], runs[:, 1]])).tolist()) - {1}
    if len(found) > configs.MAX_STEPS:
        raise UnsupportedError(
            f"mask has tiles of {len(found)} different key steps in one pass and "
            f"cupy_forward_sm90 has maps for {configs.MAX_STEPS}; pass "
            'backend="cupy_forward_sm80" or backend="triton"'
        )
    return int(plan.pass_steps[index]), tuple(sorted(found))
