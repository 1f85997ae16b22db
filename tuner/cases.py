"""What to tune: a problem with its mask, from text, JSON, or a default list."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import TYPE_CHECKING, Any

from portattn import masks
from portattn.errors import MaskError, TuningError
from portattn.problem import AttentionProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from portattn.masks import Mask

DTYPES = ("float32", "float16", "bfloat16")
FEATURES = ("softcap", "alibi", "bias", "sinks", "kv_lengths", "lse", "deterministic")
MAX_JSON_CHARS = 64 << 20
_SIZE = re.compile(r"(sq|sk|dv|kv|b|h|s|d)(\d{1,9})")
_SIZE_FIELDS = {
    "b": ("batch",),
    "h": ("num_heads",),
    "kv": ("num_kv_heads",),
    "s": ("seqlen_q", "seqlen_k"),
    "sq": ("seqlen_q",),
    "sk": ("seqlen_k",),
    "d": ("head_dim",),
    "dv": ("head_dim_v",),
}


def _local_strided(stride: int) -> Mask:
    """Causal: the last `stride` keys, and every stride-th key."""
    return masks.Band(1 - stride, 0) | (
        masks.Band(None, 0) & masks.KeyModulo(stride, stride - 1, stride)
    )


# Masks by name; their arguments are integers, as in "sliding_window:256" or "longformer:512:64".
_MASKS: dict[str, Callable[..., Mask]] = {
    "causal": masks.causal,
    "local": masks.local,
    "sliding_window": masks.sliding_window,
    "longformer": masks.longformer,
    "bigbird": masks.bigbird,
    "local_strided": _local_strided,
    "random_blocks": lambda block, count: masks.RandomBlocks(block, count, 0),
    "sparse_transformer_strided": masks.sparse_transformer_strided,
    "sparse_transformer_fixed": masks.sparse_transformer_fixed,
    "dilated": masks.dilated,
    "prefix_lm": masks.prefix_lm,
    "streaming_llm": masks.streaming_llm,
}
_GRAMMAR = (
    "sizes b h kv s (or sq sk) d dv, a dtype, masks ("
    + ", ".join(_MASKS)
    + ", with :numbers; several combine "
    "with AND), features (" + ", ".join(FEATURES) + "), and offset:N, offset:end or offset:start"
)

_CPU_DEFAULTS = (
    "b1 h8 s1024 d64 float32 causal",
    "b1 h8 s2048 d128 float32 causal",
    "b1 h8 s2048 d64 float32",
    "b1 h8 s4096 d64 float32 sliding_window:256",
    "b1 h8 sq1 sk4096 d128 float32 offset:end",
)
_GPU_DEFAULTS = (
    "b1 h16 s4096 d128 bfloat16 causal",
    "b1 h16 s16384 d128 bfloat16 causal",
    "b1 h16 s8192 d128 bfloat16",
    "b1 h16 s8192 d64 bfloat16 causal",
    "b1 h12 s16384 d64 bfloat16 longformer:512:64",
    "b1 h16 s16384 d128 bfloat16 sliding_window:4096",
    "b8 h32 kv8 sq1 sk8192 d128 bfloat16 offset:end",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One problem, and the mask whose program it holds: with the data of the program's slots."""

    problem: AttentionProblem
    mask: Mask | None

    def to_json(self) -> dict[str, Any]:
        """As plain values, for another process; `from_json` turns them back."""
        return _to_json(self)


@functools.lru_cache(maxsize=16)
def _to_json(case: Case) -> dict[str, Any]:
    problem = dataclasses.asdict(case.problem)
    problem |= {"program": list(case.problem.program), "features": sorted(case.problem.features)}
    mask = None if case.mask is None else json.loads(case.mask.to_json())
    return {"problem": problem, "mask": mask}


def from_json(values: Mapping[str, Any]) -> Case:
    """A case from `Case.to_json`."""
    fields = values["problem"]
    fields = {
        **fields,
        "program": tuple(fields["program"]),
        "features": frozenset(fields["features"]),
    }
    mask = None if values["mask"] is None else masks.from_json(json.dumps(values["mask"]))
    return Case(AttentionProblem(**fields), mask)


def from_problem(problem: AttentionProblem) -> Case:
    """A case for a problem whose program needs no data.

    Raises:
        TuningError: the program names data, which a problem does not hold: give a `Case`.
    """
    if not problem.program:
        return Case(problem, None)
    try:
        return Case(problem, masks.from_program(problem.program, ()))
    except MaskError as error:
        raise TuningError(
            f"problem's mask cannot be made from its program alone ({error}); pass Case(problem, "
            "mask)"
        ) from error


def _bad(text: str, what: str) -> TuningError:
    return TuningError(
        f'problem is {text!r}: {what}. It is made of {_GRAMMAR}; e.g. "b1 h8 s4096 d64 float32 '
        'causal"'
    )


def _mask_token(token: str, text: str) -> Mask:
    name, *numbers = token.split(":")
    try:
        return _MASKS[name](*(int(number) for number in numbers))
    except (TypeError, ValueError) as error:  # MaskError is a ValueError
        raise _bad(text, f"mask {token!r} cannot be made ({error})") from error


def parse(text: str, device: str = "cpu") -> Case:
    """A case from words, e.g. ``"b1 h8 kv8 s4096 d64 float32 causal"``.

    Args:
        text: words in any order; kv defaults to h, dv to d, b to 1, the dtype to float32, and with
            unequal lengths a mask needs an offset.
        device: torch device to tune on.

    Raises:
        TuningError: a word is unknown, or a size is missing.
    """
    fields: dict[str, Any] = {"batch": 1, "dtype": "float32"}
    features: set[str] = set()
    mask: Mask | None = None
    offset: str | None = None
    for token in text.split():
        size = _SIZE.fullmatch(token)
        if size:
            fields |= dict.fromkeys(_SIZE_FIELDS[size[1]], int(size[2]))
        elif token in DTYPES:
            fields["dtype"] = token
        elif token in FEATURES:
            features.add(token)
        elif token.startswith("offset:"):
            offset = token.partition(":")[2]
        elif token.split(":")[0] in _MASKS:
            one = _mask_token(token, text)
            mask = one if mask is None else mask & one
        else:
            raise _bad(text, f"the word {token!r} is not known")
    return _case(text, fields, features, mask, offset, device)


def _case(
    text: str,
    fields: dict[str, Any],
    features: set[str],
    mask: Mask | None,
    offset: str | None,
    device: str,
) -> Case:
    """Fill in what may be left out."""
    missing = [
        name for name in ("num_heads", "seqlen_q", "seqlen_k", "head_dim") if name not in fields
    ]
    if missing:
        raise _bad(text, f"it does not say {', '.join(missing)}")
    fields = {"num_kv_heads": fields["num_heads"], "head_dim_v": fields["head_dim"], **fields}
    if min(value for value in fields.values() if isinstance(value, int)) < 1:
        raise _bad(text, "every size must be at least 1")
    if fields["num_heads"] % fields["num_kv_heads"]:
        raise _bad(text, "kv must divide h")
    end = fields["seqlen_k"] - fields["seqlen_q"]
    if offset is None and end and mask is not None:
        raise _bad(text, "sq and sk differ, so that the mask needs offset:end or offset:start")
    try:
        q_offset = {"end": end, "start": 0}.get(offset or "start")
        q_offset = int(offset or 0) if q_offset is None else q_offset
    except ValueError as error:
        raise _bad(
            text, f"the offset {offset!r} is neither a number, 'end' nor 'start'"
        ) from error
    problem = AttentionProblem(
        device_type=device.partition(":")[0],
        device=device,
        program=mask.program if mask is not None else (),
        q_offset=q_offset,
        features=frozenset(features),
        **fields,
    )
    return Case(problem, mask)


def parse_json(text: str, device: str = "cpu") -> list[Case]:
    """Cases from a JSON list.

    Its entries are strings, as for `parse`, or objects ``{"problem": string, "mask": mask JSON}``.

    Raises:
        TuningError: the text is something else.
    """
    if len(text) > MAX_JSON_CHARS:
        raise TuningError(
            f"the problems file has {len(text)} characters; at most {MAX_JSON_CHARS} are read"
        )
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TuningError(
            f"the problems file is not JSON ({error}); it must hold a list of strings"
        ) from error
    if not isinstance(entries, list):
        raise TuningError(
            'the problems file must hold a JSON list, e.g. ["b1 h8 s4096 d64 float32 causal"]'
        )
    return [_entry(entry, device) for entry in entries]


def _entry(entry: object, device: str) -> Case:
    if isinstance(entry, str):
        return parse(entry, device)
    if (
        not isinstance(entry, dict)
        or set(entry) != {"problem", "mask"}
        or not isinstance(entry["problem"], str)
    ):
        raise TuningError(
            f"problems file: {str(entry)[:80]!r} is neither a string nor "
            f'{{"problem": ..., "mask": ...}}'
        )
    case = parse(entry["problem"], device)
    try:
        mask = masks.from_json(json.dumps(entry["mask"]))
    except MaskError as error:
        raise TuningError(
            f"problems file: the mask of {entry['problem']!r} cannot be read ({error})"
        ) from error
    return with_mask(case, mask)


def with_mask(case: Case, mask: Mask) -> Case:
    """The case with one more mask, which both must keep."""
    mask = mask if case.mask is None else case.mask & mask
    return Case(dataclasses.replace(case.problem, program=mask.program), mask)


def defaults(device: str) -> list[Case]:
    """A few problems that most models have, quick enough to be useful in a minute."""
    texts: Sequence[str] = _CPU_DEFAULTS if device.startswith("cpu") else _GPU_DEFAULTS
    return [parse(text, device) for text in texts]
