"""The operators on real tensors and on fake ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from portattn import call, validation
from portattn.backends.base import AttentionGradients
from portattn.ops.schema import Arguments, SchemaValue, mask_of
from portattn.preparation import check_scalars

if TYPE_CHECKING:
    from collections.abc import Sequence


def attention(*values: SchemaValue) -> tuple[torch.Tensor, torch.Tensor]:
    """The op on real tensors."""
    arguments = Arguments(*values)
    options = arguments.options(mask_of(arguments.program, arguments.mask_data))
    output, lse = call.run(
        arguments.query, arguments.key, arguments.value, arguments.terms(), options
    )
    if lse is None:
        lse = torch.empty(0, dtype=call.lse_dtype(arguments.query), device=arguments.query.device)
    return output, lse


def attention_fake(*values: SchemaValue) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes only. What needs the mask's data or concrete lengths is checked when the op runs."""
    arguments = Arguments(*values)
    query, key, value = values[:3]
    check_scalars(arguments.scale, arguments.softcap)
    validation.check_tensors(query, key, value, enable_gqa=True, backend=arguments.backend)
    validation.check_terms(query, key, **arguments.terms()._asdict())
    shape = query.shape[:3] if arguments.return_lse else (0,)
    lse = torch.empty(shape, dtype=call.lse_dtype(query), device=query.device)
    return call.empty_output(query, value), lse


def attention_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    wanted: Sequence[bool],
    *values: SchemaValue,
) -> tuple[torch.Tensor, ...]:
    """The backward op on real tensors; gradients are as their inputs, or of shape [0]."""
    arguments = Arguments(*values)
    results = attention_backward_fake(grad_output, grad_lse, output, lse, wanted, *values)
    targets = [
        result if is_wanted else None for result, is_wanted in zip(results, wanted, strict=True)
    ]
    bias = targets[4]
    if bias is not None:
        targets[4] = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    options = arguments.options(mask_of(arguments.program, arguments.mask_data))
    gradients = AttentionGradients(grad_output, grad_lse, *targets)
    call.run_backward(
        arguments.query,
        arguments.key,
        arguments.value,
        arguments.terms(),
        options,
        output,
        lse,
        gradients,
    )
    return results


def attention_backward_fake(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    wanted: Sequence[bool],
    *values: SchemaValue,
) -> tuple[torch.Tensor, ...]:
    """Shapes and dtypes of the gradients."""
    arguments = Arguments(*values)
    return tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if tensor is not None and is_wanted
        else torch.empty(0, dtype=arguments.query.dtype, device=arguments.query.device)
        for tensor, is_wanted in zip(arguments.differentiable(), wanted, strict=True)
    )
