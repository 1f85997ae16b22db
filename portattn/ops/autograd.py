"""The autograd formula of ``portattn::attention``, and what torch.func is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.autograd import forward_ad

from portattn import dispatch, validation
from portattn.backends import registry
from portattn.errors import UnsupportedError
from portattn.ops.schema import Arguments, SchemaValue

if TYPE_CHECKING:
    from collections.abc import Iterable

Context: TypeAlias = Any  # torch.autograd's, which has no type of its own
KeySet: TypeAlias = Any  # torch._C.DispatchKeySet


class _AttentionFunction(torch.autograd.Function):
    """Autograd formula: the forward op with its LSE, saved for the backward op."""

    @staticmethod
    def forward(
        ctx: Context, keyset: KeySet, *values: SchemaValue
    ) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = Arguments(*values)._replace(return_lse=True)
        with torch._C._AutoDispatchBelowAutograd():
            output, lse = torch.ops.portattn.attention.default.redispatch(keyset, *arguments)
        tensors = [output, lse, *arguments.mask_data]
        ctx.num_data = len(arguments.mask_data)
        ctx.present = [
            index for index, entry in enumerate(values) if isinstance(entry, torch.Tensor)
        ]
        ctx.save_for_backward(*tensors, *(values[index] for index in ctx.present))
        ctx.others = [None if isinstance(entry, torch.Tensor) else entry for entry in arguments]
        ctx.set_materialize_grads(True)
        return output, lse

    @staticmethod
    def backward(ctx: Context, *grads: torch.Tensor) -> tuple[Any, ...]:
        output, lse, *saved = ctx.saved_tensors
        values = list(ctx.others)
        for index, tensor in zip(ctx.present, saved[ctx.num_data :], strict=True):
            values[index] = tensor
        arguments = Arguments(*values)._replace(mask_data=saved[: ctx.num_data])
        needs = dict(zip(Arguments._fields, ctx.needs_input_grad[1:], strict=True))
        names = ("query", "key", "value", "alibi_slopes", "bias", "sinks")
        wanted = [bool(needs[name]) for name in names]
        found = torch.ops.portattn.attention_backward.default(
            *grads, output, lse, wanted, *arguments
        )
        by_name = {
            name: gradient
            for name, gradient, is_wanted in zip(names, found, wanted, strict=True)
            if is_wanted
        }
        return None, *(by_name.get(name) for name in Arguments._fields)


def attention_autograd(keyset: KeySet, *values: SchemaValue) -> tuple[torch.Tensor, torch.Tensor]:
    """The op at the Autograd key: through `_AttentionFunction` where an input needs a gradient."""
    below = keyset & torch._C._after_autograd_keyset
    arguments = Arguments(*values)
    refuse_tangents(arguments.differentiable())
    if torch.is_grad_enabled():
        inputs = [tensor for tensor in arguments.differentiable() if tensor is not None]
        if any(tensor.requires_grad for tensor in inputs):
            refuse_gradients(arguments.backend, arguments.query.device.type)
            results: tuple[torch.Tensor, torch.Tensor] = _AttentionFunction.apply(  # type: ignore[no-untyped-call]
                below, *values
            )
            return results
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[torch.Tensor, torch.Tensor] = (
            torch.ops.portattn.attention.default.redispatch(below, *values)
        )
    return result


class _BackwardFunction(torch.autograd.Function):
    """The backward op, which has no gradients of its own: asking for them raises."""

    @staticmethod
    def forward(ctx: Context, keyset: KeySet, *values: SchemaValue) -> tuple[torch.Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[torch.Tensor, ...] = (
                torch.ops.portattn.attention_backward.default.redispatch(keyset, *values)
            )
        return results

    @staticmethod
    def backward(ctx: Context, *grads: torch.Tensor) -> tuple[Any, ...]:
        raise UnsupportedError(
            "double backward: a gradient of attention() is differentiated again, which no "
            "backend can do. Leave create_graph=False, or write this part of the model in plain "
            "torch operations"
        )


def attention_backward_autograd(keyset: KeySet, *values: SchemaValue) -> tuple[torch.Tensor, ...]:
    """The backward op at the Autograd key: its results cannot be differentiated."""
    below = keyset & torch._C._after_autograd_keyset
    tensors = [entry for entry in values if isinstance(entry, torch.Tensor)]
    refuse_tangents(tensors)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        results: tuple[torch.Tensor, ...] = _BackwardFunction.apply(below, *values)  # type: ignore[no-untyped-call]
        return results
    with torch._C._AutoDispatchBelowAutograd():
        found: tuple[torch.Tensor, ...] = torch.ops.portattn.attention_backward.default.redispatch(
            below, *values
        )
    return found


def refuse_tangents(tensors: Iterable[torch.Tensor | None]) -> None:
    """Called at the Autograd key, where forward-mode tangents would be dropped.

    Raises:
        UnsupportedError: a tensor has one.
    """
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise UnsupportedError(
                "forward-mode AD: an input of attention() has a tangent "
                "(torch.autograd.forward_ad.make_dual, torch.func.jvp), and there are no "
                "forward-mode gradients: use reverse mode, or write this part of the model in "
                "plain torch operations"
            )


def refuse_gradients(backend: str, device_type: str) -> None:
    """Called where an input requires grad, with or without concrete sizes.

    Raises:
        UnsupportedError: no kernel of the backend has a backward.
    """
    reasons = {}
    dispatch.candidates(backend)  # an unknown one is refused as itself
    backend = dispatch.backward_backend(backend)
    for name in dispatch.candidates(backend):
        why = dispatch.absence(name, device_type, is_named=backend != "auto")
        if not why and registry.kernel(name).has_backward:
            return
        reasons[name] = why or (dispatch.NO_BACKWARD,)
    raise UnsupportedError(
        f"backend is {backend!r} and query, key, value, bias, sinks or alibi_slopes requires "
        "grad; "
        'no kernel of it has a backward: pass backend="reference", or call it under '
        "torch.no_grad():",
        reasons,
    )


def refuse_vmap(info: object, dims: object, *values: SchemaValue) -> None:
    """Raise, naming the argument."""
    for name, entry in zip(Arguments._fields, values, strict=False):
        if isinstance(entry, torch.Tensor):
            validation.check_type(name, entry)
    raise UnsupportedError(
        "portattn::attention is called under torch.func.vmap, which it does not support yet: "
        "batch by hand"
    )
