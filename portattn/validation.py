"""What a call may be: every check on the tensors and options of one attention call.

Works on shapes and dtypes only, so that it runs on fake tensors with symbolic sizes as well.
"""

from __future__ import annotations

import torch

from portattn.errors import MaskError, ShapeError, UnsupportedError
from portattn.masks import Mask

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_AXES = {
    "query": "[batch, num_heads, seqlen_q, head_dim]",
    "key": "[batch, num_kv_heads, seqlen_k, head_dim]",
    "value": "[batch, num_kv_heads, seqlen_k, head_dim_v]",
}


def check_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, enable_gqa: bool, backend: str
) -> None:
    """Ranks, sizes, dtypes and devices of query, key and value, in the bhsd layout.

    Raises:
        ShapeError: see the message.
        UnsupportedError: a device or tensor type that no backend runs on.
    """
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        check_type(name, tensor)
        if tensor.ndim != 4:
            raise ShapeError(
                f"{name} has shape {list(tensor.shape)}; it must be 4-D {_AXES[name]}: "
                "add or reshape dimensions, e.g. tensor[None] for a missing batch"
            )
    _check_dtypes(named, backend)
    _check_devices(named)
    _check_sizes(named)
    check_heads(query.shape[1], key.shape[1], enable_gqa=enable_gqa)


def check_heads(num_heads: int, num_kv_heads: int, *, enable_gqa: bool) -> None:
    """Query heads are as many as KV heads, or a multiple of them where that is asked for.

    Raises:
        ShapeError: they are not.
    """
    if num_heads != num_kv_heads and not enable_gqa:
        raise ShapeError(
            f"query has {num_heads} heads and key has {num_kv_heads}; without enable_gqa they "
            "must be equal: "
            "pass enable_gqa=True for grouped-query attention"
        )
    if (num_kv_heads == 0) != (num_heads == 0) or (num_kv_heads and num_heads % num_kv_heads):
        raise ShapeError(
            f"query has {num_heads} heads and key has {num_kv_heads}; the query heads must be a "
            "multiple of "
            "the KV heads: repeat or drop heads"
        )


def check_strides(name: str, tensor: torch.Tensor) -> None:
    """The last dimension must be contiguous; the others may have any strides.

    Raises:
        ShapeError: it is not.
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ShapeError(
            f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be 1: "
            f"pass {name}.contiguous()"
        )


def check_terms(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    kv_lengths: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """Shapes, dtypes and devices of the optional tensors.

    Raises:
        ShapeError: see the message.
    """
    batch, num_heads, seqlen_q, _ = query.shape
    if kv_lengths is not None:
        _check_term("kv_lengths", kv_lengths, query, ((batch,),))
        if kv_lengths.dtype not in (torch.int32, torch.int64):
            raise ShapeError(
                f"kv_lengths has dtype {kv_lengths.dtype}; it must be torch.int32 or torch.int64: "
                "pass kv_lengths.int()"
            )
    if alibi_slopes is not None:
        _check_term("alibi_slopes", alibi_slopes, query, ((num_heads,), (batch, num_heads)))
        _check_floating("alibi_slopes", alibi_slopes)
    if sinks is not None:
        _check_term("sinks", sinks, query, ((num_heads,),))
        _check_floating("sinks", sinks)
    if bias is not None:
        _check_bias(bias, query, (batch, num_heads, seqlen_q, key.shape[2]))


def check_mask(mask: object, batch: int, num_heads: int) -> None:
    """``mask=`` is a Mask that fits the call's batch and heads, or None.

    Raises:
        MaskError: it is something else, or does not fit.
    """
    if mask is None:
        return
    if isinstance(mask, torch.Tensor):
        is_bool = mask.dtype == torch.bool
        way = "wrap it: mask=portattn.masks.dense(tensor)" if is_bool else "pass it as bias="
        raise MaskError(
            f"mask is a tensor of {mask.dtype} with shape {list(mask.shape)}; it must be a "
            f"portattn.masks.Mask or None: {way}"
        )
    if not isinstance(mask, Mask):
        raise MaskError(
            f"mask is {type(mask).__name__} {mask!r}; it must be a portattn.masks.Mask or None: "
            "build one with portattn.masks, e.g. masks.sliding_window(256)"
        )
    if mask.batch is not None and mask.batch != batch:
        raise MaskError(
            f"mask is for batch {mask.batch} and query has batch {batch}; they must be equal: "
            "rebuild the mask"
        )
    if mask.num_heads is not None and mask.num_heads != num_heads:
        raise MaskError(
            f"mask is for {mask.num_heads} heads and query has {num_heads}; they must be equal: "
            "rebuild the mask"
        )


def check_type(name: str, tensor: object) -> None:
    """``tensor`` is a strided tensor of a kind and device that some backend runs on.

    Raises:
        ShapeError: no tensor, or not strided.
        UnsupportedError: a DTensor, a tensor of a torch.func transform, or on another device.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ShapeError(
            f"{name} is {type(tensor).__name__}; it must be a torch.Tensor: convert it with "
            "torch.as_tensor"
        )
    # By name: importing torch.distributed.tensor costs a second and most processes never do.
    if type(tensor).__name__ == "DTensor":
        raise UnsupportedError(
            f"{name} is a DTensor, which attention() does not shard yet: pass the local tensors "
            "(tensor.to_local())"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise UnsupportedError(
            f"{name} is a tensor of a torch.func transform (vmap, grad, jvp), which attention() "
            "does not "
            "support yet: call it outside the transform, batching by hand"
        )
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise UnsupportedError(
            f"{name} is on device {str(tensor.device)!r}; supported are cpu and cuda (NVIDIA and "
            "AMD): "
            f"pass {name}.cpu()"
        )
    if tensor.layout != torch.strided:
        raise ShapeError(
            f"{name} has layout {tensor.layout}; it must be torch.strided: pass {name}.to_dense()"
        )


def _check_dtypes(named: dict[str, torch.Tensor], backend: str) -> None:
    dtypes = {name: tensor.dtype for name, tensor in named.items()}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ShapeError(
            f"query, key and value have dtypes {listed}; they must be equal: convert them to one "
            "dtype"
        )
    dtype = dtypes["query"]
    if dtype in DTYPES or (dtype == torch.float64 and backend == "reference"):
        return
    raise ShapeError(
        f"query has dtype {dtype}; it must be torch.float32, torch.float16 or torch.bfloat16 "
        '(torch.float64 with backend="reference"): convert query, key and value'
    )


def _check_devices(named: dict[str, torch.Tensor]) -> None:
    devices = {name: str(tensor.device) for name, tensor in named.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} {device}" for name, device in devices.items())
        raise ShapeError(
            f"query, key and value are on {listed}; they must be on one device: move them with "
            ".to(device)"
        )


def _check_sizes(named: dict[str, torch.Tensor]) -> None:
    query, key, value = named.values()
    for axis, name, got, wanted, source in (
        (0, "key", key.shape[0], query.shape[0], "query's batch"),
        (0, "value", value.shape[0], query.shape[0], "query's batch"),
        (1, "value", value.shape[1], key.shape[1], "key's heads"),
        (2, "value", value.shape[2], key.shape[2], "key's length"),
        (3, "key", key.shape[3], query.shape[3], "query's head_dim"),
    ):
        if got != wanted:
            raise ShapeError(
                f"{name} has shape {list(named[name].shape)} as {_AXES[name]}: dimension {axis} "
                f"is {got}; "
                f"it must equal {source}, {wanted}: pass tensors of matching sizes"
            )
    for name in ("query", "value"):
        head_dim = named[name].shape[3]
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            raise ShapeError(
                f"{name} has head_dim {head_dim}; it must be in [1, {MAX_HEAD_DIM}]: split the "
                "head into "
                "several"
            )


def _check_term(
    name: str, tensor: torch.Tensor, query: torch.Tensor, shapes: tuple[tuple[int, ...], ...]
) -> None:
    check_type(name, tensor)
    if tensor.device != query.device:
        raise ShapeError(
            f"{name} is on {tensor.device} and query on {query.device}; they must be on one "
            "device: "
            f"pass {name}.to(query.device)"
        )
    if not any(tuple(tensor.shape) == shape for shape in shapes):
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        axes = "[batch]" if name == "kv_lengths" else "[num_heads]"
        raise ShapeError(
            f"{name} has shape {list(tensor.shape)}; it must be {allowed}, one entry per "
            f"{axes[1:-1]}: "
            "reshape it"
        )


def _check_floating(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise ShapeError(
            f"{name} has dtype {tensor.dtype}; it must be a floating type: pass {name}.float()"
        )


def _check_bias(bias: torch.Tensor, query: torch.Tensor, full: tuple[int, ...]) -> None:
    check_type("bias", bias)
    if bias.dtype != query.dtype:
        way = (
            "use mask=portattn.masks.dense(bias) for a bool mask"
            if bias.dtype == torch.bool
            else "pass bias.to(query.dtype)"
        )
        raise ShapeError(
            f"bias has dtype {bias.dtype}; it must be the query's, {query.dtype}: {way}"
        )
    if bias.device != query.device:
        raise ShapeError(
            f"bias is on {bias.device} and query on {query.device}; they must be on one device: "
            "pass bias.to(query.device)"
        )
    fits = bias.ndim <= 4 and all(
        size == 1 or size == wanted
        for size, wanted in zip(reversed(bias.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ShapeError(
            f"bias has shape {list(bias.shape)}; it must broadcast to [batch, num_heads, "
            "seqlen_q, seqlen_k] = "
            f"{list(full)}: insert dimensions of size 1"
        )
