"""Attention forward in raw CUDA for sm_80 and later; forward_sm80.cu has the algorithm.

Data pointers and torch's current stream go straight to the kernel: no DLPack, which has no
bfloat16 here, and no copies. One launch per pass of the plan. Not done: kv_lengths and gradients.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar, cast

from portattn.backends.base import AttentionInputs, Config, ConfigValue, Kernel
from portattn.backends.cupy import config as configs
from portattn.backends.cupy import loader
from portattn.backends.cupy.config import ForwardSm80Config
from portattn.backends.cupy.device import device_properties, device_reasons
from portattn.backends.cupy.fast_launch import device_launch, forward_call
from portattn.backends.cupy.launch import prepare
from portattn.backends.repeated import call_key, current_device, plan_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from portattn.backends.cuda_launch import Launch
    from portattn.backends.cupy.config import Variant
    from portattn.backends.cupy.loader import Program
    from portattn.backends.repeated import RepeatedCall
    from portattn.problem import AttentionProblem

MAX_LENGTH = 2**31 - 2**20  # row and key indices are int32, and tiles reach past the end


class CupyForwardSm80(Kernel):
    """mma.sync + cp.async forward for any plan: Ampere, Ada and later."""

    name: ClassVar[str] = "cupy_forward_sm80"
    backend: ClassVar[str] = "cupy"
    config_type: ClassVar[type[Config]] = ForwardSm80Config

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """See `Kernel.unsupported_reasons`."""
        reasons = self._device_reasons(problem)
        if problem.dtype not in configs.DTYPE_CODES:
            reasons.append(
                f"dtype is {problem.dtype}; it must be one of {tuple(configs.DTYPE_CODES)}"
            )
        if max(problem.head_dim, problem.head_dim_v) > 256:
            reasons.append(
                f"head_dim is {problem.head_dim} and head_dim_v {problem.head_dim_v}; both must "
                "be at most 256"
            )
        if max(problem.seqlen_q, problem.seqlen_k) > MAX_LENGTH:
            reasons.append(f"lengths must be at most {MAX_LENGTH}")
        if "kv_lengths" in problem.features:
            reasons.append("kv_lengths are not done in this kernel")
        return reasons

    def default_config(self, problem: AttentionProblem) -> Config:
        """See `Kernel.default_config`."""
        return configs.default_config(problem, self._capability(problem))

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """See `Kernel.search_space`."""
        heads = problem.batch * problem.num_heads
        return {
            "block_q": configs.BLOCKS_Q,
            "block_k": configs.BLOCKS_K if problem.dtype == "float32" else configs.BLOCKS_K[1:],
            "num_warps": configs.WARPS,
            "num_stages": configs.STAGES,
            "blocks_per_sm": configs.BLOCKS_PER_SM[:3],
            "head_group": tuple(n for n in configs.HEAD_GROUPS if n <= max(heads, 1)),
        }

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """See `Kernel.infeasible_reasons`."""
        return configs.infeasible_reasons(
            problem, cast("ForwardSm80Config", config), self._capability(problem)
        )

    def source_files(self) -> Sequence[str]:
        """The CUDA sources, and what lays out their launches."""
        names = ("forward_sm80.cu", *loader.HEADERS, "forward_sm80.py", "config.py", "launch.py")
        return [str(loader.SOURCE_DIR / name) for name in names]

    def run(self, inputs: AttentionInputs, config: Config) -> RepeatedCall | None:
        """See `Kernel.run`."""
        if inputs.output.numel() == 0:
            return None
        own = cast("ForwardSm80Config", config)
        plan = plan_of(inputs, own.block_q, own.block_k)
        with current_device(inputs.query.device):
            key = call_key(self, inputs, config)
            call = cast("RepeatedCall | None", plan.calls.get(key))
            if call is None:
                prepared = prepare(inputs, plan, own, self._workers(inputs, config))
                device = inputs.query.device
                make = functools.partial(self._make_launch, prepared.variant, device)
                made = forward_call(prepared, make, device)
                call = cast("RepeatedCall", plan.keep_call(key, made))
            if call.run(inputs):
                plan.captured = True
        return call

    def _device_reasons(self, problem: AttentionProblem) -> list[str]:
        return device_reasons(problem, self._capability)

    def _capability(self, problem: AttentionProblem) -> tuple[int, int]:
        return device_properties(problem.device).capability

    def _workers(self, inputs: AttentionInputs, config: Config) -> int:
        blocks = cast("ForwardSm80Config", config).blocks_per_sm
        return blocks * device_properties(str(inputs.query.device)).num_sms

    def _make_launch(
        self, variant: Variant, device: torch.device, arguments: Sequence[bytes]
    ) -> Launch:
        import cupy

        cupy.cuda.runtime.setDevice(device.index)  # CuPy keeps the current device per thread
        major, minor = device_properties(str(device)).capability
        shared = variant.shared_bytes()
        function = loader.load_function(
            _program(variant, f"sm_{major}{minor}"), device.index, shared
        )
        threads = 32 * variant.config.num_warps
        return device_launch(function, arguments, threads, shared, self.name)


@functools.lru_cache(maxsize=1024)
def _program(variant: Variant, arch: str) -> Program:
    return variant.program(arch)
