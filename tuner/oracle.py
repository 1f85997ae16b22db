"""Recorded times of a kernel's configs: a device that everybody has.

A table holds every config measured for one kernel and problem. `RecordedKernel` and
`ReplayExecutor` stand for kernel and device in `portattn.tuner.tune`, so that the same driver runs
without the device, with noise and faults as wanted; `portattn.tuner.simulate` compares searches.

The file is JSON, one config a line::

    {"format": "portattn-oracle", "version": 1, "device": name, "tables": [
    {"kernel": ..., "backend": ..., "problem": label, "fields": [...], "default": [...], "rows": [
    [value of each field ..., time in ns or status]
    ]}
    ]}
"""

from __future__ import annotations

import dataclasses
import json
import random
from typing import TYPE_CHECKING, Any, ClassVar

import sqlalchemy

from portattn.backends.base import AttentionInputs, Config, ConfigValue, Kernel
from portattn.errors import TuningError
from portattn.tuner.executor import Attempt, Entry, Executor
from portattn.tuner.verify import Verdict
from portattn.tuning_db import schema
from portattn.tuning_db.key import ProblemKey
from portattn.tuning_db.snapshot import check_params, key_from_values, parse_params

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from portattn.problem import AttentionProblem
    from portattn.tuner.cases import Case
    from portattn.tuning_db.store import Store

FORMAT, VERSION = "portattn-oracle", 1
MAX_CHARS = 64 << 20
_MAX_NS = 2**62


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """What was measured of one kernel on one problem.

    Attributes:
        kernel, backend: the kernel.
        problem: its label.
        fields: of the kernel's configs.
        default: the default config's values.
        outcomes: values of the fields -> time in ns, or the status of a config that failed.
    """

    kernel: str
    backend: str
    problem: str
    fields: tuple[str, ...]
    default: tuple[ConfigValue, ...]
    outcomes: Mapping[tuple[ConfigValue, ...], int | str]

    @property
    def optimum_ns(self) -> int:
        """The smallest time."""
        return min(value for value in self.outcomes.values() if isinstance(value, int))

    def outcome(self, config: Config) -> int | str:
        """Time or status of a config."""
        return self.outcomes[tuple(config.to_dict()[name] for name in self.fields)]


def load(text: str) -> tuple[str, list[Table]]:
    """The device's name and the tables of a file.

    Raises:
        TuningError: it is not such a file.
    """
    try:
        if len(text) > MAX_CHARS:
            raise ValueError(f"it has {len(text)} characters; at most {MAX_CHARS} are read")
        content = json.loads(text)
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it is not a {FORMAT} file of version {VERSION}")
        return str(content["device"])[:256], [_table(values) for values in content["tables"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise TuningError(
            f"the recorded times cannot be read: {type(error).__name__}: {str(error)[:200]}"
        ) from error


def _table(values: Mapping[str, Any]) -> Table:
    kernel, backend, problem = (values[name] for name in ("kernel", "backend", "problem"))
    fields, default = tuple(values["fields"]), tuple(values["default"])
    if not all(isinstance(text, str) for text in (kernel, backend, problem, *fields)):
        raise ValueError("kernel, backend, problem and fields are texts")
    outcomes: dict[tuple[ConfigValue, ...], int | str] = {}
    for *config, outcome in values["rows"]:
        check_params(dict(zip(fields, config, strict=True)))
        is_time = type(outcome) is int and 0 < outcome < _MAX_NS
        if not is_time and outcome not in schema.STATUSES:
            raise ValueError(f"{str(outcome)[:60]!r} is neither a time in ns nor a status")
        outcomes[tuple(config)] = outcome
    if not isinstance(outcomes.get(default), int):
        raise ValueError("the default has no time")
    return Table(kernel, backend, problem, fields, default, outcomes)


def dump(device: str, tables: Sequence[Table]) -> str:
    """The text of a file, one config a line."""
    parts = []
    for table in tables:
        head = {
            "kernel": table.kernel,
            "backend": table.backend,
            "problem": table.problem,
            "fields": table.fields,
            "default": table.default,
        }
        rows = sorted(json.dumps([*config, out]) for config, out in table.outcomes.items())
        parts.append(json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}")
    start = json.dumps({"format": FORMAT, "version": VERSION, "device": device})
    return start[:-1] + ', "tables": [\n' + ",\n".join(parts) + "\n]}\n"


def from_store(store: Store) -> tuple[str, list[Table]]:
    """Everything that a database's searches measured: the device's name, and the tables.

    A config that was measured more than once has the time of its last measurement. A problem
    without a stored best config is left out: nothing says what the default was.

    Raises:
        TuningError: the database holds several devices, or none.
    """
    m, c, k, p, d = (
        getattr(schema, name) for name in ("measurement", "config", "kernel", "problem", "device")
    )
    columns = [p.c[field.name] for field in dataclasses.fields(ProblemKey)]
    query = (
        sqlalchemy.select(
            d.c.name, k.c.name, k.c.backend, c.c.params_json, m.c.status, m.c.median_ns,
            m.c.round, m.c.ref_median_ns, *columns,
        )
        .join_from(m, c, c.c.id == m.c.config_id)
        .join(k, k.c.id == c.c.kernel_id)
        .join(p, p.c.id == m.c.problem_id)
        .join(d, d.c.id == m.c.device_id)
        .order_by(m.c.id)
    )  # fmt: skip
    with store.transaction() as connection:
        rows = list(connection.execute(query))
    devices = {row[0] for row in rows}
    if len(devices) != 1:
        raise TuningError(f"the database holds {len(devices)} devices; a table is of one")
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for _, kernel, backend, params, status, median_ns, round_, default_ns, *key in rows:
        label = key_from_values(key).label
        entry = found.setdefault((kernel, backend, label), {"outcomes": {}, "default": None})
        values = parse_params(params)
        entry["fields"] = tuple(values)
        config = tuple(values.values())
        if round_ == 0:
            entry["outcomes"][config] = median_ns if status == "ok" else status
        elif default_ns == median_ns:
            entry["default"] = config  # the finals time every config beside the default
    tables = [
        Table(*names, entry["fields"], entry["default"], entry["outcomes"])
        for names, entry in found.items()
        if isinstance(entry["outcomes"].get(entry["default"]), int)
    ]
    return devices.pop(), tables


class RecordedKernel(Kernel):
    """A kernel whose space is what was recorded; it runs on a `ReplayExecutor` only."""

    table: ClassVar[Table]

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """See `Kernel`."""
        return []

    def default_config(self, problem: AttentionProblem) -> Config:
        """See `Kernel`."""
        return self.config_of(self.table.default)

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """See `Kernel`."""
        columns = zip(*self.table.outcomes, strict=True)
        return {
            name: sorted(set(values), key=lambda value: (str(type(value)), value))
            for name, values in zip(self.table.fields, columns, strict=True)
        }

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """See `Kernel`."""
        values = tuple(config.to_dict()[name] for name in self.table.fields)
        return [] if values in self.table.outcomes else ["it was not recorded"]

    def source_files(self) -> Sequence[str]:
        """See `Kernel`."""
        return []

    def run(self, inputs: AttentionInputs, config: Config) -> None:
        """See `Kernel`."""
        raise TuningError(f"{self.name} is recorded; it runs on a ReplayExecutor only")

    def config_of(self, values: Sequence[ConfigValue]) -> Config:
        """A config from its values in the table's order."""
        return self.config_type(**dict(zip(self.table.fields, values, strict=True)))

    def configs(self) -> list[Config]:
        """All configs, the default first."""
        others = [values for values in self.table.outcomes if values != self.table.default]
        return [self.config_of(values) for values in (self.table.default, *others)]


def kernel_of(table: Table) -> RecordedKernel:
    """The kernel of a table."""
    fields = [
        (name, type(value), dataclasses.field(default=value))
        for name, value in zip(table.fields, table.default, strict=True)
    ]
    config = dataclasses.make_dataclass("RecordedConfig", fields, bases=(Config,), frozen=True)
    members = {"name": table.kernel, "backend": table.backend, "config_type": config}
    made: RecordedKernel = type("Recorded", (RecordedKernel,), {**members, "table": table})()
    return made


def no_fault(config: Config) -> str:
    """Nothing goes wrong that was not recorded."""
    return ""


class ReplayExecutor(Executor):
    """Plays recorded outcomes, with noise and faults.

    Args:
        tables: one per kernel, by the kernel's name.
        noise: standard deviation of a sample, relative.
        seed: of the noise.
        fault: says with which status a config fails; "" for as recorded.
    """

    policy = "replay"

    def __init__(
        self,
        tables: Sequence[Table],
        *,
        noise: float = 0.0,
        seed: int = 0,
        fault: Callable[[Config], str] = no_fault,
    ) -> None:
        self._tables = {table.kernel: table for table in tables}
        self._noise, self._random, self._fault = noise, random.Random(seed), fault
        self.attempts: list[tuple[str, Config]] = []

    def begin(self, case: Case) -> None:
        """See `Executor`."""

    def attempt(self, kernel: Kernel, config: Config, best_ns: int | None) -> Attempt:
        """See `Executor`."""
        self.attempts.append((kernel.name, config))
        outcome = self._fault(config) or self._tables[kernel.name].outcome(config)
        if isinstance(outcome, str):
            return Attempt(Verdict(outcome, "so it was recorded or asked for"))
        return Attempt(Verdict("ok"), tuple(self._sample(outcome) for _ in range(5)))

    def rounds(
        self, entries: Sequence[Entry], seconds: float, *, min_rounds: int
    ) -> list[list[int]]:
        """See `Executor`."""
        times = [self._tables[one.kernel.name].outcome(one.config) for one in entries]
        return [
            [self._sample(time_ns) for _ in range(max(min_rounds, 21))]
            for time_ns in times
            if isinstance(time_ns, int)
        ]

    def close(self) -> None:
        """See `Executor`."""

    def _sample(self, time_ns: int) -> int:
        """Noise is never negative beyond a bound: runs are late, not early."""
        factor = 1 + self._noise * max(self._random.gauss(), -2)
        return max(int(time_ns * factor), 1)
