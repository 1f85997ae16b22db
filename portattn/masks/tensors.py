"""Mask data: host copies of a caller's tensors, checked, hashed once and immutable after."""

from __future__ import annotations

import hashlib
import operator
from typing import SupportsIndex, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from portattn.errors import MaskError

TensorLike: TypeAlias = torch.Tensor | npt.ArrayLike

NO_LOWER = -(2**62)
NO_UPPER = 2**62

_NUMPY_DTYPES: dict[torch.dtype, type[np.generic]] = {
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.bool: np.bool_,
}

_MANY = 256  # values, from which runs of equal ones are looked for

# Tensors made here -> (version counter, digest), so that a tensor that comes back (a mask rebuilt
# from its own program and data, at every call of the op) is neither copied nor hashed again.
# Entries live as long as their tensors.
_frozen: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check_int(argument: str, value: object, low: int, high: int, hint: str = "") -> int:
    """``value`` as an int in [low, high].

    Raises:
        MaskError: not an integer, or out of range; the message ends with ``hint``.
    """
    if type(value) is not int:
        if isinstance(value, (bool, np.bool_)):
            raise MaskError(f"{argument} is {value!r}; it must be an integer, not a bool")
        try:
            value = operator.index(cast("SupportsIndex", value))
        except (TypeError, RuntimeError) as error:
            raise MaskError(
                f"{argument} is {value!r}; it must be an integer: convert it with int()"
            ) from error
    if not low <= value <= high:
        tail = f". {hint}" if hint else ""
        raise MaskError(f"{argument} is {value}; it must be in [{low}, {high}]{tail}")
    return int(value)


def check_bounds(
    name: str, low: object, high: object, hint: str = "to keep nothing use ~All()"
) -> tuple[int, int]:
    """Two bounds with None for "none", as ints with the sentinels of docs/formats.md.

    Raises:
        MaskError: a bound is no integer or |bound| >= 2**62, or the lower one is above the upper.
    """
    limit = NO_UPPER - 1
    first = NO_LOWER if low is None else check_int(f"{name}'s lower bound", low, -limit, limit)
    last = NO_UPPER if high is None else check_int(f"{name}'s upper bound", high, -limit, limit)
    if first > last:
        raise MaskError(
            f"{name} has lower bound {low} above upper bound {high}; "
            f"it must be lower <= upper: swap them, or {hint}"
        )
    return first, last


def freeze(
    argument: str, value: object, dtype: torch.dtype, ranks: tuple[int, ...]
) -> torch.Tensor:
    """A contiguous CPU copy of ``value`` that no later change of the caller's tensor reaches.

    Args:
        argument: its name in error messages.
        value: a tensor on any device, a numpy array or a (nested) sequence.
        dtype: bool (then ``value`` must be bool), int32 or int64 (any integer type that fits).
        ranks: the allowed numbers of dimensions.

    Raises:
        MaskError: wrong dtype or rank, values outside the dtype, or a tensor without data
            (traced).
    """
    if (
        isinstance(value, torch.Tensor)
        and value.dtype == dtype
        and _known_digest(value) is not None
    ):
        if value.ndim not in ranks:
            raise _rank_error(argument, tuple(value.shape), ranks)
        return value
    source = _as_array(argument, value)
    if source.ndim not in ranks:
        raise _rank_error(argument, source.shape, ranks)
    _check_values(argument, source, dtype)
    # A mask made under inference_mode must be usable outside it; autograd refuses inference
    # tensors.
    with torch.inference_mode(False):
        copy = torch.from_numpy(np.array(source, _NUMPY_DTYPES[dtype], order="C"))
    _frozen[copy] = (copy._version, _content_digest(copy))
    return copy


def digest(tensor: torch.Tensor) -> str:
    """The content hash of a tensor that `freeze` returned.

    Raises:
        MaskError: the tensor was changed in place since.
    """
    known = _known_digest(tensor)
    if known is None:
        raise MaskError(
            "a data tensor of a mask was changed in place; masks are immutable: make a new mask"
        )
    return known


def _known_digest(tensor: torch.Tensor) -> str | None:
    entry: tuple[int, str] | None = _frozen.get(tensor)  # type: ignore[no-untyped-call]
    if entry is None or entry[0] != tensor._version:
        return None
    return entry[1]


def _content_digest(tensor: torch.Tensor) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    values = tensor.numpy().reshape(-1)
    # Ids of documents come in runs, which are found ten times faster than all of them are hashed.
    if values.size >= _MANY:
        last = np.flatnonzero(values[1:] != values[:-1])
        if last.size * 16 < values.size:
            hasher.update(b"runs")
            hasher.update(last.tobytes())
            values = values[np.append(last, values.size - 1)]
    hasher.update(values.view(np.uint8).data)
    return hasher.hexdigest()


def _as_array(argument: str, value: object) -> npt.NDArray[np.generic]:
    """The value in numpy, whose host work is single-threaded; torch would wake its thread pool."""
    if isinstance(value, torch.Tensor):
        if isinstance(value, FakeTensor) or value.is_meta:
            raise MaskError(
                f"{argument} is a traced or meta tensor without data; a mask is made from real "
                "values: make it outside torch.compile and torch.export, and pass it in"
            )
        if value.is_floating_point() or value.is_complex() or value.layout != torch.strided:
            raise MaskError(
                f"{argument} has dtype {value.dtype} and layout {value.layout}; it must be a "
                "strided tensor of integers or bools: use .long(), .bool() or .to_dense()"
            )
        return np.asarray(value.detach().cpu().numpy())
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise MaskError(
            f"{argument} is {type(value).__name__}, which is no tensor, array or sequence: {error}"
        ) from error
    if array.size == 0 and array.dtype == np.float64:
        return array.astype(np.int64)  # numpy makes an empty list float
    if array.dtype.kind not in "biu":
        raise MaskError(
            f"{argument} has dtype {array.dtype}; it must hold integers or bools: convert it first"
        )
    return array


def _rank_error(argument: str, shape: tuple[int, ...], ranks: tuple[int, ...]) -> MaskError:
    allowed = " or ".join(str(rank) for rank in ranks)
    return MaskError(
        f"{argument} has shape {list(shape)}; it must have {allowed} dimensions: reshape it"
    )


def _check_values(argument: str, source: npt.NDArray[np.generic], dtype: torch.dtype) -> None:
    if (dtype == torch.bool) != (source.dtype == np.bool_):
        wanted, way = (
            ("a bool", "table != 0") if dtype == torch.bool else ("an integer", ".long()")
        )
        raise MaskError(
            f"{argument} has dtype {source.dtype}; it must be {wanted} tensor: convert it ({way})"
        )
    if not source.size or np.can_cast(source.dtype, _NUMPY_DTYPES[dtype], "safe"):
        return
    limits = torch.iinfo(dtype)
    low, high = int(np.min(source)), int(np.max(source))
    if low < limits.min or high > limits.max:
        raise MaskError(
            f"{argument} has values in [{low}, {high}]; they must fit {limits.dtype}: "
            "renumber them"
        )
