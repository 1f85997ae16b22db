"""The plain Triton forward as a kernel of the registry: what it can do, which config, run."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

import torch
import triton

from portattn.backends.base import AttentionInputs, Config, ConfigValue, Kernel, Repeat
from portattn.backends.repeated import call_key, current_device, plan_of
from portattn.backends.triton import config as configs
from portattn.backends.triton import forward_kernel, geometry, launch, limits, primitives, variant
from portattn.backends.triton.config import TritonForwardConfig
from portattn.backends.triton.limits import device_limits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.problem import AttentionProblem

_MAX_HEAD_DIM = 256
_OLDEST_TRITON = (3, 6)


def device_reasons(problem: AttentionProblem) -> list[str]:
    """What no kernel of plain Triton can run: by dtype, widths, Triton and device."""
    reasons = []
    if problem.dtype not in ("float16", "bfloat16", "float32"):
        reasons.append(f"it computes float16, bfloat16 and float32, not {problem.dtype}")
    for name, value in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v)):
        if not 1 <= value <= _MAX_HEAD_DIM:
            reasons.append(f"{name} is {value}; it computes 1 to {_MAX_HEAD_DIM}")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST_TRITON:
        reasons.append(f"it needs triton 3.6 or later; {triton.__version__} is installed")
    if problem.device_type != "cuda":
        reasons.append(f"it runs on GPUs; the tensors are on {problem.device_type}")
    elif not torch.cuda.is_available():
        reasons.append("torch sees no GPU")
    else:
        found = device_limits(problem.device)
        if not found.is_amd and found.capability < 80:
            reasons.append(f"it needs sm_80 or later; the device is {found.arch}")
    return reasons


class TritonForward(Kernel):
    """Any plan on any GPU that Triton compiles for; the result never depends on timing."""

    name: ClassVar[str] = "triton_forward"
    backend: ClassVar[str] = "triton"
    config_type: ClassVar[type[Config]] = TritonForwardConfig

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """See Kernel."""
        reasons = device_reasons(problem)
        if "kv_lengths" in problem.features:
            reasons.append(
                "it has no kv_lengths: its plans are made for lengths that the host knows"
            )
        return reasons

    def default_config(self, problem: AttentionProblem) -> Config:
        """See Kernel."""
        return configs.default_for(problem, device_limits(problem.device))

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """See Kernel."""
        found = device_limits(problem.device)
        is_float32 = problem.dtype == "float32"
        return {
            "block_q": (16, 32, 64, 128),
            "block_k": (32, 64, 128),
            "num_warps": (4, 8),
            "num_stages": (1, 2, 3, 4),
            "partial_stages": (1, 2, 3),
            "tma": (False, True) if found.has_tma else (False,),
            "head_group": tuple(problem.group_size * n for n in (1, 2, 4, 8, 16)),
            "min_piece": (8, 32),
            "precision": ("ieee", "tf32x3") if is_float32 and not found.is_amd else ("ieee",),
        }

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """See Kernel."""
        return configs.infeasible(
            problem, cast("TritonForwardConfig", config), device_limits(problem.device)
        )

    def run(self, inputs: AttentionInputs, config: Config) -> Repeat | None:
        """See Kernel."""
        if inputs.output.numel() == 0:
            return None
        own = cast("TritonForwardConfig", config)
        batch, num_heads, _, head_dim = inputs.query.shape
        device = inputs.query.device
        plan = plan_of(inputs, own.block_q, own.block_k)
        with current_device(device):
            key = call_key(self, inputs, config)
            call = plan.calls.get(key)
            if call is None:
                workers = configs.workers_of(
                    head_dim,
                    inputs.value.shape[3],
                    inputs.query.element_size(),
                    own,
                    device_limits(str(device)),
                )
                schedule = plan.schedule(
                    batch=batch,
                    num_heads=num_heads,
                    workers=workers,
                    head_dim_v=max(16, limits.next_power_of_2(inputs.value.shape[3])),
                    min_piece=own.min_piece,
                )
                made = launch.ForwardCall(inputs, plan, schedule, own)
                call = plan.keep_call(key, made)
            own_call = cast("launch.ForwardCall", call)
            if own_call.run(inputs):
                plan.captured = True
        return own_call.repeated

    def source_files(self) -> Sequence[str]:
        """See Kernel."""
        modules = (forward_kernel, primitives, variant, geometry, launch)
        return [str(module.__file__) for module in modules]
