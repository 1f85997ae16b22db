"""Backward passes on CPU tensors, and what they must give: the gradients of the reference."""

import dataclasses

import torch

from portattn.backends.base import AttentionGradients, AttentionInputs
from portattn.backends.reference.forward import ReferenceConfig, ReferenceForward
from portattn.backends.triton.backward_config import TritonBackwardConfig
from portattn.backends.triton.backward_launch import BackwardCall
from tests.triton.interpreter.calls import Call, assert_close

NAMES = ("query", "key", "value", "alibi_slopes", "bias", "sinks")


@dataclasses.dataclass
class Backward:
    """The gradients of one call; those by tensors that it does not have are not asked for."""

    call: Call
    wanted: tuple[str, ...] = NAMES
    with_lse: bool = True
    seed: torch.Tensor | None = None

    def __post_init__(self):
        call = self.call
        generator = torch.Generator().manual_seed(12)
        sizes = (call.batch, call.num_heads, call.seqlen_q)
        if self.seed is None:
            self.seed = torch.randn(*sizes, call.head_dim_v, generator=generator).to(call.dtype)
        self.lse_seed = torch.randn(sizes, generator=generator) if self.with_lse else None
        self.wanted = [n for n in self.wanted if getattr(call, n) is not None]
        bias = call.bias
        self.inputs = AttentionInputs(
            call.query, call.key, call.value, torch.empty_like(self.seed), torch.empty(sizes),
            call.mask, call.q_offset, None, call.scale, call.softcap, call.alibi_slopes,
            None if bias is None else bias.expand(*sizes, call.seqlen_k), call.sinks, False,
        )  # fmt: skip
        ReferenceForward().run(self.inputs, ReferenceConfig())

    def rounding(self):
        """Of a number that is as large as dP times a key or a query."""
        call = self.call
        largest = [x.double().norm(dim=-1).max() for x in (self.seed, call.value)]
        largest += [max(x.double().abs().max() for x in (call.query, call.key))]
        return torch.finfo(torch.float32).eps * largest[0] * largest[1] * largest[2]

    def gradients(self, fill):
        """New tensors for the gradients."""
        made = {name: None for name in NAMES}
        for name in self.wanted:
            tensor = getattr(self.call, name)
            shape = (1,) * (4 - tensor.ndim if name == "bias" else 0) + tensor.shape
            made[name] = torch.full(shape, fill, dtype=tensor.dtype)
        return AttentionGradients(self.seed, self.lse_seed, *made.values())

    def expected(self, dtype):
        """From the reference: ``"float64"``, or ``"input"`` for what eager torch computes."""
        if dtype == "float64":
            names = [name for name in NAMES if getattr(self.call, name) is not None]
            wide = {name: getattr(self.inputs, name).double() for name in names}
            if "bias" in wide:
                wide["bias"] = self.call.bias.double().expand(self.inputs.bias.shape)
            inputs = dataclasses.replace(self.inputs, **wide)
        else:
            inputs = self.inputs
        gradients = self.gradients(0.0)
        wide = gradients
        if dtype == "float64":
            doubles = {name: getattr(gradients, name).double() for name in self.wanted}
            wide = dataclasses.replace(gradients, **doubles)
        ReferenceForward().backward(inputs, wide, ReferenceConfig(dtype))
        return wide

    def run(self):
        """From the kernels."""
        call, gradients = self.call, self.gradients(torch.nan)
        config = TritonBackwardConfig(
            call.block_q, call.block_k, 4, 2, call.block_q, call.block_k, 4, 2, call.head_group,
            call.min_piece,
        )  # fmt: skip
        self.made = BackwardCall(self.inputs, gradients, config, workers=call.workers)
        self.made.run(self.inputs, gradients)
        return gradients


def check_backward(backward):
    """Compare every gradient with float64; returns them."""
    exact, eager = backward.expected("float64"), backward.expected("input")
    found = backward.run()
    for name in backward.wanted:
        actual, wanted = getattr(found, name), getattr(exact, name)
        error = getattr(eager, name).double() - wanted
        # P (dP - delta) cancels where eager's softmax does not: roundings of its two parts.
        error = error.abs().max() + backward.rounding() * (name != "value")
        assert_close(actual, wanted + error, wanted, actual.dtype)
    return found
