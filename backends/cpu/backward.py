"""The CPU backward (csrc/backward.hpp): any plan, three dtypes, deterministic.

    S = scale Q K^T;  P = exp(S - LSE);  dP = dO V^T;  dS = P (dP - delta)
    dV = P^T dO;  dK = scale dS^T Q;  dQ = scale dS K

(Dao et al., FlashAttention, 2022, algorithm 4), in one pass over the transposed plan: five
products, each key tile's dK and dV by one task, dQ summed in float32 and in a fixed order.
Workspace is O(S D).
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from typing import TYPE_CHECKING

import torch

from portattn import native
from portattn.backends.cpu import abi
from portattn.errors import ConfigError
from portattn.plan import plan_mask

if TYPE_CHECKING:
    from collections.abc import Hashable

    from portattn.backends.base import AttentionGradients, AttentionInputs
    from portattn.plan import Plan

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MAX_CACHED = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """How the backward runs.

    Attributes:
        block_q: query rows of a tile; a multiple of 32.
        block_k: keys of a tile; a multiple of the panel (`abi.panel`).
        pack: ``"none"``, ``"tiles"`` (AMX) or ``"auto"``, as for the forward.
    """

    block_q: int
    block_k: int
    pack: str


def default_tiles(inputs: AttentionInputs) -> Tiles:
    """Large tiles for any mask: blocks of 32 rows by some keys that keep nothing cost nothing.

    On AMX more keys a tile pack a query tile less often; fewer leave no thread without work.
    """
    block_k, panel, threads = 512 if abi.has_amx() else 64, abi.panel(), torch.get_num_threads()
    batch, heads, seqlen_k, _ = inputs.key.shape
    while block_k > max(panel, 64) and batch * heads * -(-seqlen_k // block_k) < 2 * threads:
        block_k //= 2
    return Tiles(block_q=128, block_k=block_k, pack="auto")


# Transposed plans by what they are for; a lock and a bound as in prepared.py.
_plans: dict[Hashable, Plan] = {}
_lock = threading.Lock()


def run(inputs: AttentionInputs, gradients: AttentionGradients, tiles: Tiles) -> None:
    """Write the gradients; see `Kernel.backward`."""
    filled = _Filled(inputs, gradients)
    if inputs.kv_lengths is None:
        filled.call(tiles, seqlen_k=inputs.key.shape[2], q_offset=inputs.q_offset, b=None)
    else:
        for tensor in (gradients.query, gradients.key, gradients.value):
            if tensor is not None:
                tensor.zero_()
        seqlen_q = inputs.query.shape[2]
        for b, length in enumerate(inputs.kv_lengths.tolist()):
            seqlen_k = min(max(length, 0), inputs.key.shape[2])
            filled.call(tiles, seqlen_k=seqlen_k, q_offset=length - seqlen_q, b=b)
    filled.store()


class _Filled:
    """The argument struct of a call, and the tensors that it points to."""

    def __init__(self, inputs: AttentionInputs, gradients: AttentionGradients) -> None:
        self.inputs, self.gradients = inputs, gradients
        self.args = abi.CpuBackwardArgs()
        self.args.struct_size = ctypes.sizeof(abi.CpuBackwardArgs)
        self.args.abi_version = native.ABI_VERSION
        grad_output = gradients.output
        if grad_output is None:
            grad_output = torch.zeros_like(inputs.output)
        self.tensors = {
            "query": inputs.query,
            "key": inputs.key,
            "value": inputs.value,
            "output": _rows_contiguous(inputs.output),
            "grad_output": _rows_contiguous(grad_output),
            "lse": inputs.lse,
            "grad_lse": gradients.lse,
            "bias": inputs.bias,
            "alibi": inputs.alibi_slopes,
            "grad_query": gradients.query,
            "grad_key": gradients.key,
            "grad_value": gradients.value,
            "grad_alibi": _sum_like(gradients.alibi_slopes),
            "grad_bias": _sum_like(gradients.bias),
            "sinks": None if inputs.sinks is None else inputs.sinks.contiguous(),
            "grad_sinks": _sum_like(gradients.sinks),
        }
        for name, tensor in self.tensors.items():
            if tensor is not None:
                self._point(name, tensor)
        batch, num_heads, seqlen_q, head_dim = inputs.query.shape
        self.args.batch, self.args.seqlen_q = batch, seqlen_q
        self.args.num_heads, self.args.num_kv_heads = num_heads, inputs.key.shape[1]
        self.args.head_dim, self.args.head_dim_v = head_dim, inputs.value.shape[3]
        self.args.dtype = _DTYPES[inputs.query.dtype]
        self.args.bias_dtype = 0 if inputs.bias is None else _DTYPES[inputs.bias.dtype]
        self.args.scale, self.args.softcap = inputs.scale, inputs.softcap
        self.args.threads = torch.get_num_threads()

    def _point(self, name: str, tensor: torch.Tensor) -> None:
        field = {"alibi": "alibi_slopes", "grad_alibi": "grad_alibi_slopes"}.get(name, name)
        setattr(self.args, field, tensor.data_ptr())
        if name in ("sinks", "grad_sinks"):
            return
        target = getattr(self.args, f"{name}_strides")
        strides = tensor.stride()
        if name == "grad_bias":  # a dimension of size 1 is summed over
            strides = tuple(
                0 if size == 1 else stride
                for size, stride in zip(tensor.shape, strides, strict=True)
            )
        if name in ("alibi", "grad_alibi") and len(strides) == 1:
            strides = (0, *strides)
        target[:] = strides[: len(target)]

    def call(self, tiles: Tiles, *, seqlen_k: int, q_offset: int, b: int | None) -> None:
        """All batches (b None), or batch b alone with its own lengths."""
        args, inputs = self.args, self.inputs
        if seqlen_k == 0:
            self._keyless(b)
            return
        plan = _transposed(inputs, tiles, seqlen_k, q_offset)
        if b is not None:
            args = abi.CpuBackwardArgs.from_buffer_copy(args)
            args.batch, args.plan_batch = 1, b
            self._move(args, b)
        args.seqlen_k, args.plan, args.pack = seqlen_k, plan.handle, abi.PACK[tiles.pack]
        error = native.error_buffer()
        code = abi.functions().portattn_cpu_backward(ctypes.byref(args), error, len(error))
        if code != 0:
            raise ConfigError(error.value.decode(errors="replace"))

    def _move(self, args: abi.CpuBackwardArgs, b: int) -> None:
        """Point every tensor at batch b."""
        for name, tensor in self.tensors.items():
            if tensor is None or name in ("sinks", "grad_sinks"):
                continue
            field = {"alibi": "alibi_slopes", "grad_alibi": "grad_alibi_slopes"}.get(name, name)
            offset = b * getattr(args, f"{name}_strides")[0] * tensor.element_size()
            setattr(args, field, getattr(args, field) + offset)

    def _keyless(self, b: int | None) -> None:
        """A batch without keys: only its LSE depends on anything, on the sink, one to one."""
        total, lse = self.tensors["grad_sinks"], self.gradients.lse
        if total is not None and lse is not None:
            part = lse if b is None else lse[b : b + 1]
            total += part.sum((0, 2))

    def store(self) -> None:
        """Write the gradients that were summed in float32."""
        targets = {
            "grad_alibi": self.gradients.alibi_slopes,
            "grad_bias": self.gradients.bias,
            "grad_sinks": self.gradients.sinks,
        }
        for name, target in targets.items():
            total = self.tensors[name]
            if target is not None and total is not None:
                target.copy_(total)


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _sum_like(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else torch.zeros(tensor.shape, dtype=torch.float32)


def _transposed(inputs: AttentionInputs, tiles: Tiles, seqlen_k: int, q_offset: int) -> Plan:
    """The transposed plan, kept for later calls."""
    batch, num_heads, seqlen_q = inputs.query.shape[:3]
    sizes = {
        "batch": batch,
        "num_heads": num_heads,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "q_offset": q_offset,
        "block_q": tiles.block_q,
        "block_k": tiles.block_k,
    }
    key = (inputs.mask, *sizes.values())
    found = _plans.get(key)
    if found is None:
        found = plan_mask(inputs.mask, **sizes).transpose()
        with _lock:
            if len(_plans) >= _MAX_CACHED:
                _plans.clear()
            _plans[key] = found
    return found
