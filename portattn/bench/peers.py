"""What one would use without portattn: SDPA, FlexAttention, flash-attn-4.

Every function makes one contender for a row or raises: NotApplicableError where the peer has no
way to compute the row, anything else where it fails. Nothing falls back in silence.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from portattn.bench.contender import Call, Contender, NotApplicableError
from portattn.bench.patterns import document_ends
from portattn.bench.peers_flex import flex
from portattn.errors import ConfigError

if TYPE_CHECKING:
    from portattn.bench.data import Data

MASK_TENSOR_LIMIT = 16384  # longest side of a bool mask given to SDPA


def _sdpa(data: Data, name: str, backend: SDPBackend | None) -> Contender:
    """SDPA through one of its backends; None: the one that torch chooses."""
    workload = data.workload
    is_host = workload.metric == "host"
    if backend is None and data.device.type == "cuda" and not is_host:
        raise NotApplicableError("its backends take part by name")
    if backend is not None and is_host:
        raise NotApplicableError(
            "choosing a backend takes longer than the call: SDPA's own choice runs"
        )
    if not workload.pattern.is_dense:
        raise NotApplicableError("SDPA has this mask only as a tensor")
    arguments: dict[str, Any] = {
        "is_causal": workload.pattern.kind == "causal",
        "enable_gqa": data.is_grouped,
    }
    if workload.lengths == "random" and data.kv_lengths is not None:
        keys = torch.arange(workload.seqlen_k, device=data.device)
        arguments["attn_mask"] = (keys < data.kv_lengths[:, None])[:, None, None, :]
    return Contender(name, False, _sdpa_call(data, backend, arguments))


def _sdpa_call(data: Data, backend: SDPBackend | None, arguments: dict[str, Any]) -> Call:
    query, key, value = data.query, data.key, data.value

    def call() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, **arguments)

    def call_with_backend() -> torch.Tensor:
        with sdpa_kernel(backend):  # type: ignore[arg-type]
            return scaled_dot_product_attention(query, key, value, **arguments)

    return call if backend is None else call_with_backend


def _sdpa_mask(data: Data, name: str) -> Contender:
    """SDPA with the mask as a bool tensor, made once and not timed."""
    workload = data.workload
    if data.mask is None or workload.pattern.kind == "causal":
        raise NotApplicableError("SDPA needs no mask tensor here")
    if workload.seqlen_k > MASK_TENSOR_LIMIT:
        raise NotApplicableError(
            f"a mask tensor of {workload.seqlen_k} squared is not made (limit {MASK_TENSOR_LIMIT})"
        )
    dense = data.mask.to_dense(workload.seqlen_q, workload.seqlen_k, 0).to(data.device)
    return Contender(name, False, _sdpa_call(data, None, {"attn_mask": dense}))


def _flash_attn_4(data: Data, name: str) -> Contender:
    """flash-attn-4's CuTe DSL kernels: dense, causal, window, packed documents, KV lengths."""
    if importlib.util.find_spec("flash_attn") is None:
        raise NotApplicableError("not installed: pip install --pre flash-attn-4")
    module = importlib.import_module("flash_attn.cute")
    flash_attn_func, flash_attn_varlen_func = (
        module.flash_attn_func,
        module.flash_attn_varlen_func,
    )

    workload = data.workload
    kind, values = workload.pattern.kind, workload.pattern.values
    query, key, value = data.bshd
    if workload.pattern.is_documents:
        return _flash_attn_documents(data, name, flash_attn_varlen_func)
    if data.kv_lengths is not None:
        run = functools.partial(
            flash_attn_varlen_func, query, key, value, seqused_k=data.kv_lengths
        )
    elif kind in ("full", "causal"):
        run = functools.partial(flash_attn_func, query, key, value, causal=kind == "causal")
    elif kind == "sliding_window":
        run = functools.partial(flash_attn_func, query, key, value, window_size=(values[0] - 1, 0))
    else:
        raise NotApplicableError("flash-attn-4 has no such mask")
    return Contender(name, False, lambda: _first(run()), layout="bshd")


def _flash_attn_documents(data: Data, name: str, function: Callable[..., Any]) -> Contender:
    pattern, length = data.workload.pattern, data.workload.seqlen_k
    query, key, value = (tensor[0] for tensor in data.bshd)

    def run(ends: torch.Tensor) -> torch.Tensor:
        longest, ends = int(ends.diff().max()), ends.to(data.device, non_blocking=True)
        return run_on_device(ends, longest)

    def run_on_device(ends: torch.Tensor, longest: int) -> torch.Tensor:
        result = function(
            query, key, value, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest,
            max_seqlen_k=longest, causal=pattern.kind == "causal_documents",
        )  # fmt: skip
        return _first(result)[None]

    ends = document_ends(length, pattern.values[0], 0)
    longest, there = int(ends.diff().max()), ends.to(data.device)
    return Contender(
        name,
        False,
        lambda: run_on_device(there, longest),
        layout="bshd",
        fresh=lambda seed: run(document_ends(length, pattern.values[0], seed)),
    )


def _first(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The output of a call that may return the LSE beside it."""
    output: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return output


_FLASH = {"BACKEND": "FLASH"}
Make = Callable[["Data", str], Contender]
_GPU: dict[str, Make] = {
    "sdpa": lambda data, name: _sdpa(data, name, None),
    "sdpa_flash": lambda data, name: _sdpa(data, name, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": lambda data, name: _sdpa(data, name, SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": lambda data, name: _sdpa(data, name, SDPBackend.EFFICIENT_ATTENTION),
    "flash_attn_4": _flash_attn_4,
    "flex": flex,
    "flex_flash_attn_4": lambda data, name: flex(data, name, _FLASH),
}
_CPU: dict[str, Make] = {
    "sdpa": lambda data, name: _sdpa(data, name, None),
    "sdpa_mask": _sdpa_mask,
    "flex": flex,
}


def peer_names(device_type: str, chosen: list[str] | None = None) -> list[str]:
    """Peers to run on a device type; default all of them.

    Raises:
        ConfigError: a name is not a peer there.
    """
    known = _CPU if device_type == "cpu" else _GPU
    for name in chosen or ():
        if name not in known:
            raise ConfigError(
                f"peer is {name!r}; on {device_type} it must be one of {', '.join(known)}, or none"
            )
    return [name for name in known if chosen is None or name in chosen]


def peer(name: str, data: Data) -> Contender:
    """A peer for a row."""
    # A pool of compilers inside each process would only be in the way of the warm-up's.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # flash-attn-4 then keeps compiled kernels on disk, where the warm-up's processes put them.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    known = _CPU if data.device.type == "cpu" else _GPU
    return known[name](data, name)
