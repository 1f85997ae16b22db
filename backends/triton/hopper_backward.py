"""The Gluon backward for Hopper as a kernel of the registry: what it can do, which config, run."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from portattn.backends.base import (
    AttentionGradients,
    AttentionInputs,
    Config,
    ConfigValue,
    Kernel,
    Repeat,
)
from portattn.backends.repeated import current_device, plan_of
from portattn.backends.triton import hopper_backward_config as configs
from portattn.backends.triton.hopper_backward_config import TritonBackwardHopperConfig
from portattn.backends.triton.hopper_config import tile_steps
from portattn.backends.triton.hopper_device import device_reasons
from portattn.backends.triton.limits import device_limits
from portattn.masks.opcodes import instructions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.backends.triton.hopper_backward_launch import HopperBackwardCall
    from portattn.problem import AttentionProblem

_MAX_HEAD_DIM = 128
_BY_HEAD = frozenset({10, 16})  # BLOCK_TABLE, PER_HEAD
_SOURCES = (
    "backward_rows",
    "backward_sides",
    "backward_terms",
    "hopper_adapter",
    "hopper_backward_config",
    "hopper_backward_finish",
    "hopper_backward_kernel",
    "hopper_backward_launch",
    "hopper_backward_primitives",
    "hopper_maps",
    "hopper_primitives",
    "hopper_work",
)


class TritonBackwardHopper(Kernel):
    """Gradients of any plan on Hopper, with TMA, wgmma and specialised warps.

    dQ is summed in the order in which items end: its last bits may differ between runs.
    """

    name: ClassVar[str] = "triton_backward_hopper"
    backend: ClassVar[str] = "triton"
    config_type: ClassVar[type[Config]] = TritonBackwardHopperConfig
    has_backward: ClassVar[bool] = True

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """See Kernel."""
        reasons = []
        if problem.dtype not in ("float16", "bfloat16"):
            reasons.append(f"it computes float16 and bfloat16, not {problem.dtype}")
        for name, value in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v)):
            if not 1 <= value <= _MAX_HEAD_DIM:
                reasons.append(f"{name} is {value}; it computes 1 to {_MAX_HEAD_DIM}")
        if problem.seqlen_k == 0:
            reasons.append("there are no keys, and TMA has no empty tensors")
        if "grad" not in problem.features:
            reasons.append("it computes gradients only")
        reasons += [
            f"it has no {name}"
            for name in ("kv_lengths", "bias", "softcap", "alibi")
            if name in problem.features
        ]
        if "deterministic" in problem.features:
            reasons.append("it adds to dQ in the order in which its programs end")
        opcodes = {opcode for opcode, _ in instructions(problem.program)}
        if problem.group_size > 1 and opcodes & _BY_HEAD:
            reasons.append("query heads that share keys need to share their mask")
        steps = tile_steps(problem.program)
        if len(steps) > 1:
            reasons.append(
                f"the mask strides over {sorted(steps)} keys; it takes one stride beside 1"
            )
        return reasons + device_reasons(problem)

    def default_config(self, problem: AttentionProblem) -> Config:
        """See Kernel."""
        return configs.default_for(problem)

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """Empty: the tuner measures forwards only."""
        return {}

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """See Kernel."""
        return configs.infeasible(
            problem, cast("TritonBackwardHopperConfig", config), device_limits(problem.device)
        )

    def run(self, inputs: AttentionInputs, config: Config) -> Repeat | None:
        """Never called: `unsupported_reasons` refuses every problem without gradients."""
        raise NotImplementedError(f"{self.name} computes gradients only")

    def backward(
        self, inputs: AttentionInputs, gradients: AttentionGradients, config: Config
    ) -> None:
        """See Kernel."""
        # Gluon is imported where it runs: other devices have no use for it.
        from portattn.backends.triton.backward_launch import backward_key
        from portattn.backends.triton.hopper_backward_launch import HopperBackwardCall

        own = cast("TritonBackwardHopperConfig", config)
        plan = plan_of(inputs, configs.BLOCK_Q, configs.BLOCK_K)
        with current_device(inputs.query.device):
            key = backward_key(self, inputs, gradients, own)
            call = plan.calls.get(key)
            if call is None:
                columns = plan.transpose()
                schedule = columns.schedule(
                    batch=inputs.key.shape[0],
                    num_heads=inputs.key.shape[1],
                    # One program fills a multiprocessor.
                    workers=device_limits(str(inputs.query.device)).num_sms,
                    # Pieces add to memory that is there already.
                    head_dim_v=1,
                    min_piece=own.min_piece,
                )
                made = HopperBackwardCall(inputs, gradients, columns, schedule, own)
                call = plan.keep_call(key, made)
            if cast("HopperBackwardCall", call).run(inputs, gradients):
                plan.captured = True

    def source_files(self) -> Sequence[str]:
        """See Kernel."""
        own = __file__
        return [own, *(own.replace("hopper_backward", name) for name in _SOURCES)]
