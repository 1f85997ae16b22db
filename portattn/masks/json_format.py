"""Masks as JSON text: pure functions between text and (program, data).

    {"format": "portattn.mask", "version": 1, "program": [1, 7, 0],
     "data": [{"dtype": "int64", "shape": [3], "values": [0, 5, 9]}]}

A tensor's elements, in row-major order, stand under ``values`` (numbers; 0 and 1 for bool) or, for
more than 64 of them, under ``base64``: little-endian bytes, bools packed eight to a byte, lowest
bit first.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portattn.errors import MaskError

FORMAT = "portattn.mask"
FORMAT_VERSION = 1
MAX_JSON_BYTES = 2**28
_LIST_LIMIT = 64
_DTYPES: dict[str, npt.DTypeLike] = {"int32": "<i4", "int64": "<i8", "bool": np.bool_}


def dump(program: tuple[int, ...], data: tuple[torch.Tensor, ...]) -> str:
    """The JSON text of a mask."""
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "program": list(program),
        "data": [_dump_tensor(tensor) for tensor in data],
    }
    return json.dumps(record, separators=(",", ":"))


def load(text: str | bytes, max_bytes: int) -> tuple[tuple[int, ...], tuple[torch.Tensor, ...]]:
    """(program, data) of untrusted text, its shape checked but not yet the program's sense.

    Raises:
        MaskError: not this format, another version, or larger than max_bytes.
    """
    if not isinstance(text, (str, bytes)):
        raise MaskError(f"text is {type(text).__name__}; it must be str or bytes from to_json()")
    if len(text) > max_bytes:
        raise MaskError(
            f"the mask's JSON has {len(text)} bytes; at most {max_bytes} are read: "
            "pass a larger max_bytes if you trust the source"
        )
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MaskError(
            f"the mask's JSON cannot be read: {error}; write it with to_json()"
        ) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise MaskError(f'the JSON is no mask: it needs "format": "{FORMAT}", as to_json() writes')
    if record.get("version") != FORMAT_VERSION:
        raise MaskError(
            f"the mask's JSON has version {record.get('version')!r}; this portattn reads "
            f"{FORMAT_VERSION}: write it again, or update portattn"
        )
    program, tensors = record.get("program"), record.get("data")
    if not isinstance(program, list) or not all(type(value) is int for value in program):
        raise MaskError('the mask\'s JSON has a "program" that is no list of integers')
    if not isinstance(tensors, list):
        raise MaskError('the mask\'s JSON has a "data" that is no list of tensors')
    return tuple(program), tuple(
        _load_tensor(n, entry, max_bytes) for n, entry in enumerate(tensors)
    )


def _dump_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    name = str(tensor.dtype).removeprefix("torch.")
    record: dict[str, Any] = {"dtype": name, "shape": list(tensor.shape)}
    flat = tensor.numpy().reshape(-1)
    if flat.size <= _LIST_LIMIT:
        record["values"] = [int(value) for value in flat]
    else:
        packed = np.packbits(flat, bitorder="little") if name == "bool" else flat
        raw = packed.astype(packed.dtype.newbyteorder("<")).tobytes()
        record["base64"] = base64.b64encode(raw).decode("ascii")
    return record


def _load_tensor(slot: int, entry: object, max_bytes: int) -> torch.Tensor:
    where = f"data[{slot}] of the mask's JSON"
    if not isinstance(entry, dict) or entry.get("dtype") not in tuple(_DTYPES):
        raise MaskError(f"{where} needs a dtype out of {sorted(_DTYPES)}; write it with to_json()")
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) > 4
        or not all(type(size) is int and 0 <= size < 2**40 for size in shape)
    ):
        raise MaskError(f"{where} has shape {shape!r}; it must be a list of at most 4 sizes >= 0")
    count = math.prod(shape)
    if count > max_bytes:
        raise MaskError(f"{where} has {count} elements; at most {max_bytes} (max_bytes) are read")
    flat = _load_values(where, entry, dtype, count)
    return torch.from_numpy(flat.astype(dtype.newbyteorder("=")).reshape(shape))


def _load_values(
    where: str, entry: dict[str, Any], dtype: np.dtype[Any], count: int
) -> npt.NDArray[Any]:
    values, text = entry.get("values"), entry.get("base64")
    if isinstance(values, list) and text is None:
        low, high = (0, 1) if dtype == np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if len(values) != count or not all(type(v) is int and low <= v <= high for v in values):
            raise MaskError(f'{where} needs {count} integers in [{low}, {high}] under "values"')
        return np.array(values, dtype)
    if not isinstance(text, str) or values is not None:
        raise MaskError(f'{where} needs either "values" (a list) or "base64" (text)')
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MaskError(f"{where} has broken base64: {error}") from error
    expected = -(-count // 8) if dtype == np.bool_ else count * dtype.itemsize
    if len(raw) != expected:
        raise MaskError(f"{where} has {len(raw)} bytes; its shape and dtype need {expected}")
    if dtype == np.bool_:
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), count=count, bitorder="little")
        return bits.astype(np.bool_)
    return np.frombuffer(raw, dtype)
