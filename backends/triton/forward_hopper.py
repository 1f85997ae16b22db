"""The Gluon forward for Hopper as a kernel of the registry: what it can do, which config, run."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from portattn.backends.base import AttentionInputs, Config, ConfigValue, Kernel, Repeat
from portattn.backends.repeated import current_device, plan_of
from portattn.backends.triton import hopper_config as configs
from portattn.backends.triton.hopper_config import TritonForwardHopperConfig
from portattn.backends.triton.hopper_device import device_reasons
from portattn.backends.triton.limits import device_limits
from portattn.masks.opcodes import BAND, instructions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.backends.triton.hopper_launch import HopperCall
    from portattn.problem import AttentionProblem

_MAX_HEAD_DIM = 256
_MAX_DECODE_ROWS = 64  # query rows that share keys, up to which decode kernels are faster
_SOURCES = (
    "hopper_adapter",
    "hopper_config",
    "hopper_consumer",
    "hopper_epilogue",
    "hopper_kernel",
    "hopper_launch",
    "hopper_maps",
    "hopper_primitives",
    "hopper_variant",
    "hopper_work",
    "primitives",
)


class TritonForwardHopper(Kernel):
    """Any plan on Hopper, with TMA, wgmma and specialised warps; the result never varies.

    Rows that TMA cannot read (not 16-byte aligned, or expanded) are copied once per call, O(S D).
    """

    name: ClassVar[str] = "triton_forward_hopper"
    backend: ClassVar[str] = "triton"
    config_type: ClassVar[type[Config]] = TritonForwardHopperConfig

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
        if "kv_lengths" in problem.features:
            reasons.append(
                "it has no kv_lengths: its plans are made for lengths that the host knows"
            )
        if "bias" in problem.features:
            reasons.append("it has no bias: the registers of a tile of it are taken")
        if "grad" in problem.features:
            reasons.append("it has no backward")
        steps = configs.tile_steps(problem.program)
        if len(steps) > 1:
            reasons.append(
                f"the mask strides over {sorted(steps)} keys; it takes one stride beside 1"
            )
        return reasons + device_reasons(problem)

    def is_preferred(self, problem: AttentionProblem) -> bool:
        """On dense and causal problems and windows, where it was the fastest in every case.

        Measured on an H100 (benchmarks/results/h100_forward.json); decoding is left to others.
        """
        opcodes = {opcode for opcode, _ in instructions(problem.program)}
        return opcodes <= {BAND} and problem.seqlen_q * problem.group_size > _MAX_DECODE_ROWS

    def default_config(self, problem: AttentionProblem) -> Config:
        """See Kernel."""
        return configs.default_for(problem)

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """See Kernel."""
        return {
            "block_q": (128, 192),
            "block_k": (64, 128),
            "num_stages": (2, 3),
            "registers": (160, 224, 232, 240),
            "head_group": tuple(problem.group_size * n for n in (1, 2, 4, 8, 16)),
            "min_piece": (8, 32),
        }

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """See Kernel."""
        return configs.infeasible(
            problem, cast("TritonForwardHopperConfig", config), device_limits(problem.device)
        )

    def run(self, inputs: AttentionInputs, config: Config) -> Repeat | None:
        """See Kernel."""
        if inputs.output.numel() == 0:
            return None
        # Gluon is imported where it runs: other devices have no use for it.
        from portattn.backends.triton.hopper_launch import HopperCall, hopper_key

        own = cast("TritonForwardHopperConfig", config)
        batch, num_heads = inputs.query.shape[:2]
        device = inputs.query.device
        plan = plan_of(inputs, own.block_q, own.block_k)
        with current_device(device):
            key = hopper_key(self, inputs, own)
            call = plan.calls.get(key)
            if call is None:
                schedule = plan.schedule(
                    batch=batch,
                    num_heads=num_heads,
                    # One program fills a multiprocessor.
                    workers=device_limits(str(device)).num_sms,
                    head_dim_v=configs.block_width(inputs.value.shape[3]),
                    min_piece=own.min_piece,
                )
                call = plan.keep_call(key, HopperCall(inputs, plan, schedule, own))
            own_call = cast("HopperCall", call)
            if own_call.run(inputs):
                plan.captured = True
        return own_call.repeated

    def source_files(self) -> Sequence[str]:
        """See Kernel."""
        own = __file__
        return [own, *(own.replace("forward_hopper", name) for name in _SOURCES)]
