"""The autograd formula of ``portattn::attention``, and what torch.func is told."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from portattn import dispatch, validation
from portattn.backends import registry
from portattn.errors import UnsupportedError
from portattn.ops.schema import Arguments, SchemaValue

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
    if torch.is_grad_enabled():
        arguments = Arguments(*values)
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


def refuse_gradients(backend: str, device_type: str) -> None:
    """Called where an input requires grad, with or without concrete sizes.

    Raises:
        UnsupportedError: no kernel of the backend has a backward.
    """
    reasons = {}
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
