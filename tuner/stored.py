"""Stored best configs beside the default, each problem in a fresh process."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import sqlalchemy

from portattn import dispatch
from portattn.backends import registry
from portattn.errors import ConfigError, TuningError
from portattn.tuner.confirm import Confirmation, confirm
from portattn.tuner.remote import RemoteExecutor
from portattn.tuner.sources import from_shape
from portattn.tuning_db import schema
from portattn.tuning_db.identity import source_of_files, toolchain_class
from portattn.tuning_db.key import ProblemKey
from portattn.tuning_db.snapshot import key_from_values, parse_params

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from portattn.backends.base import Config, Kernel
    from portattn.device import DeviceKey
    from portattn.tuner.cases import Case
    from portattn.tuning_db.store import Store


@dataclasses.dataclass(frozen=True, slots=True)
class StoredRow:
    """What became of one best row.

    Attributes:
        kernel, policy: of the row.
        label: its problem.
        params: its config.
        status: ``"faster"``, ``"equal"`` (no difference beyond the interval), ``"slower"``,
            ``"default"`` (it is the default: nothing was run), ``"wrong"`` (it failed, or is not
            right), or ``"left out"``.
        confirmation: what was measured; None if nothing was.
        reason: why it was left out, or is wrong.
    """

    kernel: str
    policy: str
    label: str
    params: Mapping[str, int | bool | str]
    status: str
    confirmation: Confirmation | None = None
    reason: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether nobody should run this config."""
        return self.status in ("slower", "wrong")

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        values = dataclasses.asdict(self)
        del values["confirmation"]
        if self.confirmation is not None and self.confirmation.ratio is not None:
            ratio = self.confirmation.ratio
            values |= {"best_ns": self.confirmation.best_ns}
            values |= {"default_ns": self.confirmation.default_ns}
            values |= {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}
        return values


def confirm_stored(
    store: Store,
    device: DeviceKey,
    name: str,
    *,
    kernels: Sequence[str] | None = None,
    seconds: float = 1.0,
) -> Iterator[StoredRow]:
    """Verify and time every best row of a device beside its kernel's default.

    Rows of one problem and policy share a process, in which nothing ran before.

    Args:
        store: the database.
        device: which.
        name: its torch name.
        kernels: names; None for all.
        seconds: of rounds, for each row.

    Raises:
        DeviceLostError: nothing can be measured any more.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in _rows(store, device):
        if kernels is None or one["kernel_name"] in kernels:
            groups.setdefault((one["policy"], one["shape_json"] or ""), []).append(one)
    for (policy, _), rows in groups.items():
        executor: RemoteExecutor | None = None
        try:
            for row in rows:
                try:
                    case, kernel, config = _prepare(row, name)
                except (TuningError, ConfigError, ValueError, KeyError, TypeError) as error:
                    yield _found(row, "left out", reason=str(error)[:300])
                    continue
                default = kernel.default_config(case.problem)
                if config == default:
                    yield _found(row, "default")
                    continue
                if executor is None:
                    executor = RemoteExecutor(name, policy)
                    executor.begin(case)
                yield _judged(row, confirm(kernel, default, config, executor, seconds))
        finally:
            if executor is not None:
                executor.close()


def _judged(row: Mapping[str, Any], done: Confirmation) -> StoredRow:
    if done.ratio is None:
        return _found(row, "wrong", done, done.reason)
    return _found(
        row, "faster" if done.is_faster else "slower" if done.is_slower else "equal", done
    )


def _found(
    row: Mapping[str, Any], status: str, done: Confirmation | None = None, reason: str = ""
) -> StoredRow:
    try:
        params = parse_params(row["params_json"])
        label = key_from_values([row[field.name] for field in _KEY]).label
    except (ValueError, TypeError) as error:
        params, label, reason = {}, "?", reason or str(error)[:300]
    return StoredRow(row["kernel_name"], row["policy"], label, params, status, done, reason)


def _prepare(row: Mapping[str, Any], device: str) -> tuple[Case, Kernel, Config]:
    """What to run.

    Raises:
        TuningError, ConfigError, ValueError, KeyError, TypeError: it cannot be run any more.
    """
    if row["kernel_name"] not in registry.KERNELS:
        raise TuningError("there is no such kernel any more")
    case = from_shape(row, device)
    refusals = dispatch.refusals(row["kernel_name"], case.problem)
    if refusals:
        raise TuningError("; ".join(refusals))
    kernel = registry.kernel(row["kernel_name"])
    now = (
        toolchain_class(kernel.backend),
        source_of_files(tuple(map(str, kernel.source_files()))),
    )
    if now != (row["toolchain_class"], row["source_sha256"]):
        raise TuningError(
            "it is of another kernel source or toolchain, and a candidate only: "
            "`portattn tune --stale` measures it anew"
        )
    return case, kernel, kernel.config_from_dict(parse_params(row["params_json"]))


_KEY = dataclasses.fields(ProblemKey)


def _rows(store: Store, device: DeviceKey) -> list[dict[str, Any]]:
    """The best rows of a device, each with the exact sizes of the measurement it rests on."""
    b, k, p, m, c = schema.best, schema.kernel, schema.problem, schema.measurement, schema.config
    query = (
        sqlalchemy.select(
            *(b.c.kernel_name, b.c.toolchain_class, b.c.policy, k.c.source_sha256),
            *(c.c.params_json, m.c.shape_json),
            *(p.c[field.name] for field in _KEY),
        )
        .join_from(b, c, c.c.id == b.c.config_id)
        .join(k, k.c.id == c.c.kernel_id)
        .join(p, p.c.id == b.c.problem_id)
        .join(schema.device, schema.device.c.id == b.c.device_id)
        .outerjoin(m, m.c.id == b.c.measurement_id)
        .where(schema.device.c.fp_sha256 == device.fingerprint)
        .order_by(p.c.id, b.c.policy, b.c.kernel_name, b.c.toolchain_class)
    )
    with store.transaction() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def dump(device: str, rows: Sequence[StoredRow]) -> str:
    """The rows as JSON text."""
    content = {"device": device, "rows": [row.to_json() for row in rows]}
    return json.dumps(content, indent=1) + "\n"
