"""What to tune, from where it is asked for: words, files, models, presets, and the database."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import sqlalchemy
import torch

from portattn import masks
from portattn.errors import MaskError, TuningError
from portattn.masks.opcodes import instructions
from portattn.problem import AttentionProblem
from portattn.tuner import cases
from portattn.tuner.inputs import WITH_DATA
from portattn.tuning_db import missed as missed_table
from portattn.tuning_db import schema
from portattn.tuning_db.identity import source_of_files, space_sha256, toolchain_class
from portattn.tuning_db.key import bucket

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from portattn.device import DeviceKey
    from portattn.tuner.cases import Case
    from portattn.tuning_db.store import Store

MAX_FILE_BYTES = cases.MAX_JSON_CHARS
_MAX_SIZE = 1 << 26
_SIZES = ("batch", "num_heads", "num_kv_heads", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v")
_DOCUMENTS = 16
_TABLE_SEED = 0


def read_file(path: Path, device: str) -> list[Case]:
    """Problems from a file: JSON as `cases.parse_json` takes it, or one problem a line.

    Empty lines, and what follows ``#``, say nothing.

    Raises:
        TuningError: the file cannot be read, or a line is no problem; it names the line.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TuningError(f"problems file {path} has more than {MAX_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TuningError(f"problems file {path} cannot be read: {error}") from error
    if text.lstrip()[:1] in ("[", "{"):
        return cases.parse_json(text, device)
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].strip()
        try:
            found += [cases.parse(words, device)] if words else []
        except TuningError as error:
            raise TuningError(f"problems file {path}, line {number}: {error}") from error
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """Problems from the database.

    Attributes:
        cases: to tune.
        left_out: label -> why it is not among them.
    """

    cases: tuple[Case, ...]
    left_out: Mapping[str, str]


def missed(store: Store, device: str, name: str, *, min_count: int = 1) -> Found:
    """What calls on a device asked for and nobody tuned there: the most frequent first.

    Args:
        store: where `portattn.tuning_db.misses` stored it.
        device: its fingerprint, or a family.
        name: the torch name of such a device.
        min_count: rarer ones are left out.
    """
    found: list[Case] = []
    left_out: dict[str, str] = {}
    for row in missed_table.missed(store, device, min_count=min_count):
        try:
            values = json.loads(row.problem_json)
            found.append(rebuild(values, values["program"], values["features"], name))
        except (TuningError, ValueError, KeyError, TypeError, RecursionError) as error:
            left_out[f"missed problem {row.key_sha256[:12]}"] = str(error)[:300]
    return Found(tuple(dict.fromkeys(found)), left_out)


def stale(store: Store, device: DeviceKey, name: str) -> Found:
    """Problems with a best config of another toolchain, kernel source or search space.

    Each is made again from the measurement that its best config rests on. Where nothing is stale
    nothing is found.

    Args:
        store: the database.
        device: which.
        name: its torch name.
    """
    found: list[Case] = []
    left_out: dict[str, str] = {}
    for row in _best_rows(store, device):
        try:
            case = from_shape(row, name)
            if _is_current(row, case):
                continue
            found.append(case)
        except (TuningError, ValueError, KeyError, TypeError, RecursionError) as error:
            label = f"{row['kernel_name']} on problem {row['key_sha256'][:12]}"
            left_out[label] = str(error)[:300]
    return Found(tuple(dict.fromkeys(found)), left_out)


def _best_rows(store: Store, device: DeviceKey) -> Sequence[Mapping[str, Any]]:
    """Of each kernel and bucket of a device the newest best row, with its newest shape."""
    b, k, p, m, c = schema.best, schema.kernel, schema.problem, schema.measurement, schema.config
    shape = (
        sqlalchemy.select(m.c.shape_json)
        .where(
            m.c.device_id == b.c.device_id,
            m.c.problem_id == b.c.problem_id,
            m.c.config_id == b.c.config_id,
        )
        .order_by(m.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    query = (
        sqlalchemy.select(
            *(b.c.kernel_name, b.c.backend, b.c.toolchain_class, p.c.key_sha256, p.c.mask_kind),
            *(k.c.source_sha256, k.c.space_sha256, shape.label("shape_json")),
        )
        .join_from(b, c, c.c.id == b.c.config_id)
        .join(k, k.c.id == c.c.kernel_id)
        .join(p, p.c.id == b.c.problem_id)
        .join(schema.device, schema.device.c.id == b.c.device_id)
        .where(schema.device.c.fp_sha256 == device.fingerprint)
        .order_by(b.c.updated_us.desc(), b.c.kernel_name, p.c.key_sha256)
    )
    with store.transaction() as connection:
        rows = [dict(row) for row in connection.execute(query).mappings()]
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        newest.setdefault((row["kernel_name"], row["key_sha256"]), row)
    return list(newest.values())


def _is_current(row: Mapping[str, Any], case: Case) -> bool:
    """Whether the kernel still is what was tuned; one that is no more counts as current."""
    from portattn import dispatch
    from portattn.backends import registry

    name = row["kernel_name"]
    if name not in registry.KERNELS or dispatch.refusals(name, case.problem):
        return True  # nothing to measure here
    kernel = registry.kernel(name)
    now = (
        toolchain_class(kernel.backend),
        source_of_files(tuple(map(str, kernel.source_files()))),
        space_sha256(kernel.search_space(case.problem)),
    )
    return now == (row["toolchain_class"], row["source_sha256"], row["space_sha256"])


def from_shape(row: Mapping[str, Any], device: str) -> Case:
    """The problem of a measurement (`work.shape_of`).

    Args:
        row: with shape_json and mask_kind.
        device: torch device.

    Raises:
        TuningError, ValueError, KeyError, TypeError: the row does not say enough.
    """
    shape = json.loads(row["shape_json"] or "{}")
    if not isinstance(shape, dict) or not shape:
        raise TuningError("no measurement says its exact sizes; give it with --problem")
    if "program" in shape:
        program = [int(word) for word in shape["program"].split()]
    elif row["mask_kind"] == "dense":
        program = []
    elif row["mask_kind"] == "causal":
        program = list(masks.causal().program)
    else:
        raise TuningError("its measurement does not say which mask it had; give it with --problem")
    return rebuild(shape, program, shape["features"].split("+"), device)


def rebuild(
    sizes: Mapping[str, Any], program: Sequence[int], features: Sequence[str], device: str
) -> Case:
    """A problem of which the database knows everything but its mask's data.

    Args:
        sizes: the sizes, dtype and q_offset, by the names of AttentionProblem; not trusted.
        program: the mask's; [] for none.
        features: those that are no words of `cases.parse` are left out.
        device: torch device.

    Raises:
        TuningError, KeyError: a value is missing or makes no sense.
    """
    for field in _SIZES:
        value = sizes[field]
        if type(value) is not int or not 1 <= value <= _MAX_SIZE:
            raise TuningError(f"{field} is {str(value)[:40]}; it must be in [1, {_MAX_SIZE}]")
    offset = sizes["q_offset"]
    if type(offset) is not int or abs(offset) > _MAX_SIZE or sizes["dtype"] not in cases.DTYPES:
        raise TuningError("its dtype or q_offset makes no sense")
    problem = AttentionProblem(
        device_type=device.partition(":")[0],
        device=device,
        dtype=sizes["dtype"],
        q_offset=offset,
        program=tuple(program),
        features=frozenset(features) & frozenset(cases.FEATURES),
        **{field: sizes[field] for field in _SIZES},
    )
    if not program:
        return cases.Case(problem, None)
    try:
        mask = masks.from_program(program, _stand_ins(problem))
    except (MaskError, ValueError) as error:
        raise TuningError(f"its mask cannot be made ({error})") from error
    case = cases.Case(dataclasses.replace(problem, program=mask.program), mask)
    bucket(case.problem)
    return case


def _stand_ins(problem: AttentionProblem) -> list[torch.Tensor]:
    """Data for a program's slots: the tuning key does not know the data either.

    Sets hold the first 64 positions, tables keep one block in eight, ids are those of 16 documents
    of equal lengths, and lengths are full.
    """
    keys = problem.seqlen_k
    rows = max(problem.q_offset, 0) + problem.seqlen_q
    data: dict[int, torch.Tensor] = {}
    for opcode, operands in instructions(problem.program):
        if opcode not in WITH_DATA:
            continue
        if opcode in (7, 8):
            data[operands[0]] = torch.arange(min(64, keys))
        elif opcode == 10:
            slot, block_q, block_k = operands
            generator = torch.Generator().manual_seed(_TABLE_SEED)
            shape = (-(-rows // max(block_q, 1)), -(-keys // max(block_k, 1)))
            table = torch.rand(shape, generator=generator) < 1 / 8
            data[slot] = table | torch.eye(*shape, dtype=torch.bool)
        elif opcode == 11:
            for slot, length in zip(operands, (rows, keys), strict=True):
                ids = torch.arange(max(length, data.get(slot, torch.empty(0)).numel()))
                data[slot] = (ids * _DOCUMENTS // max(rows, keys)).to(torch.int32)
        elif opcode == 18:
            bounds = torch.arange(_DOCUMENTS + 1) * max(rows, keys) // _DOCUMENTS
            data[operands[0]] = torch.unique(bounds)
        else:
            data[operands[0]] = torch.full((problem.batch,), keys, dtype=torch.int64)
    return [data[slot] for slot in sorted(data)]
