"""The reference kernel: `equations.attention_rows` over blocks of rows, with gradients.

It reads the mask's own predicate and no plan, so that it shares no code with what it judges. It
is slow and O(seqlen_q * seqlen_k) in time; memory is bounded by `blocks.MAX_SCORES`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from portattn.backends.base import AttentionGradients, AttentionInputs, Config, ConfigValue, Kernel
from portattn.backends.reference.blocks import (
    RowBlock,
    bias_as_given,
    bias_index,
    existing,
    per_head,
    row_blocks,
)
from portattn.backends.reference.equations import attention_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from portattn.problem import AttentionProblem


@dataclasses.dataclass(frozen=True, slots=True)
class ReferenceConfig(Config):
    """How the reference computes.

    Attributes:
        dtype: ``"float64"``, or ``"input"`` for the dtype of the inputs: the eager computation
            whose error is the yardstick of the conformance suite.
    """

    dtype: str = "float64"


class ReferenceForward(Kernel):
    """Eager torch on any device; never chosen by ``backend="auto"``."""

    name: ClassVar[str] = "reference"
    backend: ClassVar[str] = "reference"
    config_type: ClassVar[type[Config]] = ReferenceConfig
    has_backward: ClassVar[bool] = True

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Nothing is refused: dispatch has checked what a call may be."""
        return []

    def default_config(self, problem: AttentionProblem) -> Config:
        """float64."""
        return ReferenceConfig()

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """Empty: the law is not tuned."""
        return {}

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """An unknown dtype name."""
        dtype = cast("ReferenceConfig", config).dtype
        allowed = ("float64", "input")
        return [] if dtype in allowed else [f"dtype is {dtype!r}; it must be one of {allowed}"]

    @torch.no_grad()
    def run(self, inputs: AttentionInputs, config: Config) -> None:
        """See `Kernel.run`."""
        dtype = _compute_dtype(inputs, config)
        for block in row_blocks(inputs):
            output, lse = _attend(_block_tensors(inputs, block, dtype), block, inputs)
            inputs.output[block.batch, :, block.rows] = output.to(inputs.output.dtype)
            if inputs.lse is not None:
                inputs.lse[block.batch, :, block.rows] = lse.to(inputs.lse.dtype)

    def backward(
        self, inputs: AttentionInputs, gradients: AttentionGradients, config: Config
    ) -> None:
        """See `Kernel.backward`: torch differentiates each block; the blocks' gradients add."""
        dtype = _compute_dtype(inputs, config)
        sums = _Tensors(*(
            None if target is None else torch.zeros_like(target, dtype=dtype)
            for target in (
                gradients.query, gradients.key, gradients.value, gradients.alibi_slopes,
                gradients.bias, gradients.sinks,
            )
        ))  # fmt: skip
        for block in row_blocks(inputs):
            _add_block(inputs, gradients, sums, block, dtype)
        for name in _Tensors.NAMES:
            target = getattr(gradients, name)
            if target is not None:
                target.copy_(getattr(sums, name))


def _compute_dtype(inputs: AttentionInputs, config: Config) -> torch.dtype:
    is_eager = cast("ReferenceConfig", config).dtype == "input"
    return inputs.query.dtype if is_eager else torch.float64


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensors:
    """The differentiable tensors of a call or of one of its blocks."""

    NAMES: ClassVar[tuple[str, ...]] = ("query", "key", "value", "alibi_slopes", "bias", "sinks")

    query: torch.Tensor | None
    key: torch.Tensor | None
    value: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None


def _block_tensors(inputs: AttentionInputs, block: RowBlock, dtype: torch.dtype) -> _Tensors:
    """The block's part of the inputs. Slopes and sinks stay float32 or wider, as everywhere."""
    bias = None if inputs.bias is None else bias_as_given(inputs.bias)
    wide = torch.promote_types(dtype, torch.float32)
    slopes = per_head(inputs.alibi_slopes, block.batch)
    return _Tensors(
        query=inputs.query[block.batch, :, block.rows].to(dtype),
        key=existing(inputs.key[block.batch], block.num_keys).to(dtype),
        value=existing(inputs.value[block.batch], block.num_keys).to(dtype),
        alibi_slopes=None if slopes is None else slopes.to(wide),
        bias=None if bias is None else bias[bias_index(bias, block)].to(dtype),
        sinks=None if inputs.sinks is None else inputs.sinks.to(wide),
    )


def _attend(
    tensors: _Tensors, block: RowBlock, inputs: AttentionInputs
) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_rows(
        cast("torch.Tensor", tensors.query),
        cast("torch.Tensor", tensors.key),
        cast("torch.Tensor", tensors.value),
        keep=block.keep,
        distance=block.distance,
        scale=inputs.scale,
        softcap=inputs.softcap,
        slopes=tensors.alibi_slopes,
        bias=tensors.bias,
        sinks=tensors.sinks,
    )


def _add_block(
    inputs: AttentionInputs,
    gradients: AttentionGradients,
    sums: _Tensors,
    block: RowBlock,
    dtype: torch.dtype,
) -> None:
    """Add the gradients of one block of rows to the sums."""
    tensors = _block_tensors(inputs, block, dtype)
    wanted = [name for name in _Tensors.NAMES if getattr(sums, name) is not None]
    leaves = {
        name: tensor.detach().requires_grad_(name in wanted)
        for name in _Tensors.NAMES
        if (tensor := getattr(tensors, name)) is not None
    }
    with _autograd():
        results = _attend(_Tensors(**{**dict.fromkeys(_Tensors.NAMES), **leaves}), block, inputs)
    seeds = [
        torch.zeros_like(result)
        if given is None
        else given[block.batch, :, block.rows].to(result.dtype)
        for result, given in zip(results, (gradients.output, gradients.lse), strict=True)
    ]
    found = torch.autograd.grad(
        results, [leaves[name] for name in wanted], seeds, allow_unused=True
    )
    for name, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            _part(sums, name, block).add_(gradient)


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Record operations, also inside an operator, where torch has switched autograd off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _part(sums: _Tensors, name: str, block: RowBlock) -> torch.Tensor:
    """The view of a sum that a block's gradient belongs to."""
    total: torch.Tensor = getattr(sums, name)
    if name == "query":
        return total[block.batch, :, block.rows]
    if name == "bias":
        return total[bias_index(total, block)]
    if name == "sinks" or (name == "alibi_slopes" and total.ndim == 1):
        return total
    return total[block.batch]
