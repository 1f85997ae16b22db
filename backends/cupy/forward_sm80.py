"""Attention forward in raw CUDA for sm_80 and later; forward_sm80.cu has the algorithm.

Data pointers and torch's current stream go straight to the kernel: no DLPack, which has no
bfloat16 here, and no copies. One launch per pass of the plan. Not done: kv_lengths and gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch

from portattn.backends.base import AttentionInputs, Config, ConfigValue, Kernel
from portattn.backends.cupy import config as configs
from portattn.backends.cupy import loader
from portattn.backends.cupy.config import ForwardSm80Config
from portattn.backends.cupy.launch import prepare
from portattn.backends.cupy.params import layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.backends.cupy.config import Variant
    from portattn.backends.cupy.loader import Program
    from portattn.problem import AttentionProblem

_MAX_LENGTH = 2**31 - 2**20  # row and key indices are int32, and tiles reach past the end


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
        if max(problem.seqlen_q, problem.seqlen_k) > _MAX_LENGTH:
            reasons.append(f"lengths must be at most {_MAX_LENGTH}")
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

    def run(self, inputs: AttentionInputs, config: Config) -> None:
        """See `Kernel.run`."""
        if inputs.output.numel() == 0:
            return
        launch = prepare(inputs, cast("ForwardSm80Config", config), self._workers(inputs, config))
        for index in range(launch.num_passes):
            grid, params = launch.pass_params(index)
            self._launch(launch.variant, grid, params, inputs.query.device)

    def _device_reasons(self, problem: AttentionProblem) -> list[str]:
        if problem.device_type != "cuda":
            return [f"it runs on CUDA devices; the tensors are on {problem.device_type!r}"]
        if torch.version.hip is not None:
            return ["it is CUDA source with NVIDIA's PTX; this torch is built for ROCm"]
        major, minor = self._capability(problem)
        if major < 8:
            return [f"it needs compute capability 8.0; {problem.device} has {major}.{minor}"]
        missing = loader.nvrtc_problem()
        return [] if missing is None else [missing]

    def _capability(self, problem: AttentionProblem) -> tuple[int, int]:
        return _device_properties(problem.device).capability

    def _workers(self, inputs: AttentionInputs, config: Config) -> int:
        blocks = cast("ForwardSm80Config", config).blocks_per_sm
        return blocks * _device_properties(str(inputs.query.device)).num_sms

    def _launch(self, variant: Variant, grid: int, params: bytes, device: torch.device) -> None:
        import cupy

        index = torch.cuda.current_device() if device.index is None else device.index
        major, minor = _device_properties(str(device)).capability
        with torch.cuda.device(index):
            cupy.cuda.runtime.setDevice(index)  # CuPy keeps the current device per thread
            shared = variant.shared_bytes()
            program = _program(variant, f"sm_{major}{minor}")
            function = loader.load_function(program, index, shared)
            stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(index).cuda_stream)
            argument = np.frombuffer(params, dtype=_params_dtype())[0]  # passed by value
            threads = 32 * variant.config.num_warps
            function((grid,), (threads,), (argument,), shared_mem=shared, stream=stream)


@functools.lru_cache(maxsize=1024)
def _program(variant: Variant, arch: str) -> Program:
    return variant.program(arch)


@functools.cache
def _params_dtype() -> np.dtype[np.void]:
    return np.dtype((np.void, layout()[1].size))


@dataclasses.dataclass(frozen=True, slots=True)
class _DeviceProperties:
    capability: tuple[int, int]
    num_sms: int


@functools.cache
def _device_properties(device: str) -> _DeviceProperties:
    found = torch.cuda.get_device_properties(device)
    return _DeviceProperties((found.major, found.minor), found.multi_processor_count)
