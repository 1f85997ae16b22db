"""Which variant of the Hopper forward a pass of a call runs: its compile-time constants."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from portattn.backends.triton.hopper_config import (
    LAUNCH_REGISTERS,
    block_width,
    output_in_query,
)
from portattn.masks.opcodes import DOCUMENTS, SEGMENTS, instructions

if TYPE_CHECKING:
    from portattn.backends.base import AttentionInputs
    from portattn.backends.triton.hopper_config import TritonForwardHopperConfig
    from portattn.masks import Mask
    from portattn.plan import Plan, Schedule


@dataclasses.dataclass(frozen=True, slots=True)
class HopperPass:
    """What one pass needs of the kernel.

    Attributes:
        first_item, num_items: of the schedule.
        q_step: of the pass's rows.
        k_step: of its key tiles whose step is not 1; q_step if there are none.
        stepped: whether one of the two is not 1.
        ids: whether it has id tiles.
    """

    first_item: int
    num_items: int
    q_step: int
    k_step: int
    stepped: bool
    ids: bool


@dataclasses.dataclass(frozen=True, slots=True)
class HopperVariant:
    """The compile-time side of one launch, in the order of the kernel's last parameters.

    Attributes:
        short_width: head_dim_v where tiles may have fewer rows than block_q with other tiles' rows
            behind them, as those of packed documents do; else 0. Being able to store such rows
            costs other masks up to 8 %.
    """

    block_q: int
    num_stages: int
    registers: int
    out_in_query: bool
    stepped: bool
    ids: bool
    pieces: bool
    first: bool
    last: bool
    scaled: bool
    softcap: bool
    alibi: bool
    sinks: bool
    store_lse: bool
    short_width: int

    def values(self) -> tuple[int | bool, ...]:
        """The fields, in order."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def constants(self) -> dict[str, int | bool]:
        """By the kernel's parameter names."""
        return {name.upper(): getattr(self, name) for name in self.__slots__}


def compile_options(block_q: int) -> dict[str, int | bool]:
    """What every compilation is told; a consumer has 4 warps."""
    return {"num_warps": 4, "maxnreg": LAUNCH_REGISTERS[block_q], "enable_fp_fusion": True}


def pass_of(plan: Plan, schedule: Schedule, index: int) -> HopperPass:
    """What the tiles of one pass are like."""
    items = int(schedule.item_ptr[index]), int(schedule.items_per_pass[index])
    q_step = int(plan.pass_steps[index])
    first, last = (int(plan.row_ptr[(index + i) * plan.num_layouts]) for i in (0, 1))
    rows = plan.rows[first:last]
    ids, steps = False, set[int]()
    if len(rows) and (plan.has_steps or plan.num_id_rows):
        # Rows may share entries; the span from the first to the last is a safe superset.
        tiles = plan.tiles[int(rows[:, 2].min()) : int(rows[:, 3].max())]
        runs = plan.runs[int(rows[:, 4].min()) : int(rows[:, 5].max())]
        steps = {int(step) for part in (tiles, runs) for step in set(part[:, 1].tolist())} - {1}
        ids = bool((tiles[:, 2] != tiles[:, 3]).any())
    assert len(steps) <= 1, f"steps {steps} in one pass: unsupported_reasons refuses such masks"
    k_step = steps.pop() if steps else q_step
    return HopperPass(*items, q_step, k_step, q_step != 1 or k_step != 1, ids)


def make_variant(
    inputs: AttentionInputs,
    config: TritonForwardHopperConfig,
    shape: HopperPass,
    *,
    pieces: bool,
    first: bool,
    last: bool,
) -> HopperVariant:
    """The variant of the kernel that computes one pass of a call."""
    widths = block_width(inputs.query.shape[3]), block_width(inputs.value.shape[3])
    softcap, alibi = inputs.softcap != 0.0, inputs.alibi_slopes is not None
    return HopperVariant(
        config.block_q,
        config.num_stages,
        config.registers,
        output_in_query(widths, config),
        shape.stepped,
        shape.ids,
        pieces,
        first,
        last,
        # max(S) * scale is the maximum of S * scale only for scale > 0.
        softcap or alibi or inputs.scale <= 0.0,
        softcap,
        alibi,
        inputs.sinks is not None,
        inputs.lse is not None,
        inputs.value.shape[3] if _is_packed(inputs.mask) else 0,
    )


def _is_packed(mask: Mask | None) -> bool:
    """Whether tiles may begin with documents: by the program, which renewed launches share."""
    if mask is None:
        return False
    return any(opcode in (SEGMENTS, DOCUMENTS) for opcode, _ in instructions(mask.program))
