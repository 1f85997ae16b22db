"""The torch operators: schema, kernels, fake and autograd formulas, registered on import."""

import torch

from portattn.ops.autograd import (
    attention_autograd,
    attention_backward_autograd,
    refuse_vmap,
)
from portattn.ops.forward import (
    attention,
    attention_backward,
    attention_backward_fake,
    attention_fake,
)
from portattn.ops.invoke import call_op
from portattn.ops.schema import ARGUMENTS, BACKWARD_ARGUMENTS

__all__ = ["LIBRARY", "call_op"]

LIBRARY = torch.library.Library("portattn", "DEF")  # type: ignore[no-untyped-call]


def _register() -> None:
    tags = (
        torch.Tag.needs_fixed_stride_order,
        torch.Tag.pt2_compliant_tag,
        # Kernels keep plans and counters on the device; those must not be allocated from the pool
        # of the graph that torch.compile(mode="reduce-overhead") happens to be recording.
        torch.Tag.cudagraph_unsafe,
    )
    returns = ", ".join(["Tensor"] * 6)
    LIBRARY.define(f"attention({ARGUMENTS}) -> (Tensor, Tensor)", tags=tags)  # type: ignore[no-untyped-call]
    LIBRARY.define(f"attention_backward({BACKWARD_ARGUMENTS}) -> ({returns})", tags=tags)  # type: ignore[no-untyped-call]
    for device in ("CPU", "CUDA"):
        LIBRARY.impl("attention", attention, device)  # type: ignore[no-untyped-call]
        LIBRARY.impl("attention_backward", attention_backward, device)  # type: ignore[no-untyped-call]
    LIBRARY.impl("attention", attention_autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
    LIBRARY.impl(  # type: ignore[no-untyped-call]
        "attention_backward", attention_backward_autograd, "Autograd", with_keyset=True
    )
    torch.library.register_fake("portattn::attention", attention_fake, lib=LIBRARY)
    torch.library.register_fake(
        "portattn::attention_backward", attention_backward_fake, lib=LIBRARY
    )
    torch.library.register_vmap("portattn::attention", refuse_vmap, lib=LIBRARY)


_register()
