"""Attention forward in raw CUDA for sm_90a (Hopper); forward_sm90.cu has the algorithm.

Query, key and value are read by the copy engine. Where it cannot read them in place (rows that do
not start at multiples of 16 bytes, expanded dimensions) they are copied first, which is O(S D).
One launch per pass of the plan. Not done: float32, kv_lengths and gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from portattn.backends.base import AttentionInputs, Config, ConfigValue, Kernel
from portattn.backends.cupy import config_sm90 as configs
from portattn.backends.cupy import loader
from portattn.backends.cupy.config_sm90 import ForwardSm90Config
from portattn.backends.cupy.device import device_properties
from portattn.backends.cupy.fast_launch import device_launch, forward_call
from portattn.backends.cupy.forward_sm80 import MAX_LENGTH
from portattn.backends.cupy.launch_sm90 import prepare
from portattn.backends.cupy.tensor_map import encode, is_readable, readable
from portattn.backends.repeated import call_key, current_device, plan_of
from portattn.masks.opcodes import DIFF_MODULO, KEY_MODULO, instructions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.backends.cuda_launch import Launch
    from portattn.backends.cupy.config_sm90 import Variant
    from portattn.backends.cupy.launch_sm90 import HopperLaunch
    from portattn.backends.cupy.tensor_map import MapShape
    from portattn.backends.repeated import RepeatedCall
    from portattn.problem import AttentionProblem


_MAX_MAPS = 1024


class CupyForwardSm90(Kernel):
    """wgmma + TMA forward for any plan: Hopper."""

    name: ClassVar[str] = "cupy_forward_sm90"
    backend: ClassVar[str] = "cupy"
    config_type: ClassVar[type[Config]] = ForwardSm90Config

    def __init__(self) -> None:
        self._maps: dict[MapShape, bytes] = {}

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """See `Kernel.unsupported_reasons`."""
        reasons = self._device_reasons(problem)
        if problem.dtype not in ("float16", "bfloat16"):
            reasons.append(f"dtype is {problem.dtype}; it must be float16 or bfloat16")
        if max(problem.head_dim, problem.head_dim_v) > 256:
            reasons.append(
                f"head_dim is {problem.head_dim} and head_dim_v {problem.head_dim_v}; both must "
                "be at most 256"
            )
        if max(problem.seqlen_q, problem.seqlen_k) > MAX_LENGTH:
            reasons.append(f"lengths must be at most {MAX_LENGTH}")
        if "kv_lengths" in problem.features:
            reasons.append("kv_lengths are not done in this kernel")
        steps = _key_steps(problem.program)
        if len(steps) > configs.MAX_STEPS:
            reasons.append(
                f"the mask has moduli {sorted(steps)}; it has tensor maps for {configs.MAX_STEPS}"
            )
        return reasons

    def default_config(self, problem: AttentionProblem) -> Config:
        """See `Kernel.default_config`."""
        return configs.default_config(problem)

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """See `Kernel.search_space`."""
        heads = problem.batch * problem.num_heads
        return {
            "consumers": configs.CONSUMERS,
            "block_k": configs.BLOCKS_K,
            "num_stages": configs.STAGES,
            "ping_pong": (False, True),
            "persistent": (False, True),
            "blocks_per_sm": (1, 2),
            "head_group": tuple(n for n in configs.HEAD_GROUPS if n <= max(heads, 1)),
            "min_piece": (8, 32),
        }

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """See `Kernel.infeasible_reasons`."""
        return configs.infeasible_reasons(problem, cast("ForwardSm90Config", config))

    def source_files(self) -> Sequence[str]:
        """The CUDA sources, and what lays out their launches."""
        device = ("direct_store.cuh", "hopper.cuh", "ptx_sm90.cuh", "softmax_sm90.cuh")
        own = ("forward_sm90.cu", *device, "wgmma.py")
        python = ("forward_sm90.py", "config_sm90.py", "launch_sm90.py", "launch.py")
        names = (*own, *loader.HEADERS, *python)
        return [str(loader.SOURCE_DIR / name) for name in names]

    def run(self, inputs: AttentionInputs, config: Config) -> RepeatedCall | None:
        """See `Kernel.run`."""
        if inputs.output.numel() == 0:
            return None
        own = cast("ForwardSm90Config", config)
        plan = plan_of(inputs, own.block_q, own.block_k)
        with current_device(inputs.query.device):
            key = call_key(self, inputs, config)
            call = cast("RepeatedCall | None", plan.calls.get(key))
            # The key holds the strides, but of the addresses only whether all are aligned.
            if call is None or _is_misaligned(inputs):
                copied = _readable_inputs(inputs)
                if copied is not inputs:  # such calls are never kept
                    self.run(copied, config)
                    return None
                launch = prepare(inputs, plan, own, self._workers(inputs, config))
                made = self._make_call(launch, inputs)
                call = cast("RepeatedCall", plan.keep_call(key, made))
            if call.run(inputs):
                plan.captured = True
        return call

    def _device_reasons(self, problem: AttentionProblem) -> list[str]:
        if problem.device_type != "cuda":
            return [f"it runs on CUDA devices; the tensors are on {problem.device_type!r}"]
        if torch.version.hip is not None:
            return ["it is CUDA source with NVIDIA's PTX; this torch is built for ROCm"]
        capability = device_properties(problem.device).capability
        if capability != (9, 0):
            return [
                "it needs Hopper (compute capability 9.0); "
                f"{problem.device} has {capability[0]}.{capability[1]}"
            ]
        missing = loader.nvrtc_problem()
        return [] if missing is None else [missing]

    def _workers(self, inputs: AttentionInputs, config: Config) -> int:
        blocks = cast("ForwardSm90Config", config).blocks_per_sm
        return blocks * device_properties(str(inputs.query.device)).num_sms

    def _make_call(self, launch: HopperLaunch, inputs: AttentionInputs) -> RepeatedCall:
        device = inputs.query.device
        make = functools.partial(self._make_launch, launch.variant, launch.config.threads, device)
        return forward_call(
            launch, make, device, lambda index: launch.hopper(inputs, index, self._encode)
        )

    def _encode(self, address: int, shape: MapShape) -> bytes:
        # The driver takes 10 us for one. Its address does not matter: launches put in their own.
        found = self._maps.get(shape)
        if found is None:
            if len(self._maps) >= _MAX_MAPS:
                self._maps.clear()
            found = self._maps[shape] = encode(address, shape)
        return found

    def _make_launch(
        self, variant: Variant, threads: int, device: torch.device, arguments: Sequence[bytes]
    ) -> Launch:
        import cupy

        cupy.cuda.runtime.setDevice(device.index)  # CuPy keeps the current device per thread
        shared = variant.shared_bytes()
        function = loader.load_function(_program(variant), device.index, shared)
        return device_launch(function, arguments, threads, shared, self.name)


def _key_steps(program: Sequence[int]) -> set[int]:
    """Key steps that a mask's plan may have: the moduli of its program."""
    return {
        operands[0]
        for opcode, operands in instructions(program)
        if opcode in (KEY_MODULO, DIFF_MODULO)
    }


def _is_misaligned(inputs: AttentionInputs) -> bool:
    addresses = inputs.query.data_ptr() | inputs.key.data_ptr() | inputs.value.data_ptr()
    return addresses % 16 != 0


def _readable_inputs(inputs: AttentionInputs) -> AttentionInputs:
    if all(is_readable(tensor) for tensor in (inputs.query, inputs.key, inputs.value)):
        return inputs
    return dataclasses.replace(
        inputs,
        query=readable(inputs.query),
        key=readable(inputs.key),
        value=readable(inputs.value),
    )


@functools.lru_cache(maxsize=1024)
def _program(variant: Variant) -> loader.Program:
    return variant.program()
