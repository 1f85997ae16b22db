"""The Triton decode as a kernel of the registry: what it can do, which config, run."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from portattn.backends import scalar_mask
from portattn.backends.base import AttentionInputs, Config, ConfigValue, Kernel, Repeat
from portattn.backends.triton import decode_config as configs
from portattn.backends.triton import decode_kernel, decode_launch, primitives
from portattn.backends.triton.decode_config import TritonDecodeConfig
from portattn.backends.triton.forward import device_reasons
from portattn.backends.triton.limits import device_limits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.problem import AttentionProblem


class TritonDecode(Kernel):
    """Few query rows, or KV lengths on the device; the result never depends on timing."""

    name: ClassVar[str] = "triton_decode"
    backend: ClassVar[str] = "triton"
    config_type: ClassVar[type[Config]] = TritonDecodeConfig

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """See Kernel."""
        reasons = device_reasons(problem)
        if scalar_mask.streaming_mask(problem.program) is None:
            reasons.append(
                "its masks are bands and key ranges joined by &, which it plans on the device; "
                "other masks run in the forward kernel, without kv_lengths"
            )
        rows = configs.rows_of(problem)
        if "kv_lengths" not in problem.features and rows > configs.MAX_ROWS:
            reasons.append(
                f"seqlen_q times query heads per KV head is {rows}; above {configs.MAX_ROWS} the "
                "forward kernel is faster"
            )
        return reasons

    def default_config(self, problem: AttentionProblem) -> Config:
        """See Kernel."""
        return configs.default_for(problem, device_limits(problem.device))

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """See Kernel."""
        found = device_limits(problem.device)
        is_float32, rows = problem.dtype == "float32", configs.rows_of(problem)
        return {
            "block_q": tuple(n for n in (16, 32, 64, 128) if n == 16 or n // 2 < rows),
            "block_k": (32, 64, 128),
            "num_warps": (1, 2, 4, 8),
            "num_stages": (2, 3, 4, 5),
            "pieces_per_sm": (1, 2, 3, 4, 6, 8, 12, 16, 24),
            "min_piece": (1, 2, 4),
            "precision": ("ieee", "tf32x3") if is_float32 and not found.is_amd else ("ieee",),
        }

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """See Kernel."""
        return configs.infeasible(
            problem, cast("TritonDecodeConfig", config), device_limits(problem.device)
        )

    def run(self, inputs: AttentionInputs, config: Config) -> Repeat | None:
        """See Kernel."""
        return decode_launch.run_decode(self, inputs, cast("TritonDecodeConfig", config))

    def source_files(self) -> Sequence[str]:
        """See Kernel."""
        modules = (decode_kernel, decode_launch, scalar_mask, primitives)
        return [str(module.__file__) for module in modules]
