"""The plain Triton backward as a kernel of the registry: what it can do, which config, run."""

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
from portattn.backends.triton import (
    backward_columns,
    backward_launch,
    backward_primitives,
    backward_rows,
    backward_sides,
    backward_terms,
    primitives,
)
from portattn.backends.triton import backward_config as configs
from portattn.backends.triton.backward_config import TritonBackwardConfig
from portattn.backends.triton.forward import device_reasons
from portattn.backends.triton.limits import device_limits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.problem import AttentionProblem


class TritonBackward(Kernel):
    """Gradients of any plan on any GPU that Triton compiles for; they never depend on timing."""

    name: ClassVar[str] = "triton_backward"
    backend: ClassVar[str] = "triton"
    config_type: ClassVar[type[Config]] = TritonBackwardConfig
    has_backward: ClassVar[bool] = True

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """See Kernel."""
        reasons = device_reasons(problem)
        if "grad" not in problem.features:
            reasons.append("it computes gradients only")
        if "kv_lengths" in problem.features:
            reasons.append(
                "it has no kv_lengths: its plans are made for lengths that the host knows"
            )
        if not reasons:
            config = self.default_config(problem)
            reasons += self.infeasible_reasons(problem, config)
        return reasons

    def default_config(self, problem: AttentionProblem) -> Config:
        """See Kernel."""
        return configs.default_for(problem, device_limits(problem.device))

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """Empty: the tuner measures forwards only."""
        return {}

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """See Kernel."""
        return configs.infeasible(
            problem, cast("TritonBackwardConfig", config), device_limits(problem.device)
        )

    def run(self, inputs: AttentionInputs, config: Config) -> Repeat | None:
        """Never called: `unsupported_reasons` refuses every problem without gradients."""
        raise NotImplementedError(f"{self.name} computes gradients only")

    def backward(
        self, inputs: AttentionInputs, gradients: AttentionGradients, config: Config
    ) -> None:
        """See Kernel."""
        own = cast("TritonBackwardConfig", config)
        plan = plan_of(inputs, own.column_block_q, own.column_block_k)
        with current_device(inputs.query.device):
            key = backward_launch.backward_key(self, inputs, gradients, config)
            call = plan.calls.get(key)
            if call is None:
                call = plan.keep_call(key, backward_launch.BackwardCall(inputs, gradients, own))
            if cast("backward_launch.BackwardCall", call).run(inputs, gradients):
                plan.captured = True

    def source_files(self) -> Sequence[str]:
        """See Kernel."""
        modules = (
            backward_columns, backward_launch, backward_primitives, backward_rows,
            backward_sides, backward_terms, primitives,
        )  # fmt: skip
        return [str(module.__file__) for module in modules]
