"""Recorded times of a kernel's configs: a device that everybody has.

A table holds every config measured for one kernel and problem. `portattn.tuner.replay` makes a
kernel and a device of it, `portattn.tuner.simulate` compares searches on it.

The file is JSON; a digit of a row stands for one of its field's values::

    {"format": "portattn-oracle", "version": 1, "device": name, "tables": [
    {"kernel": ..., "backend": ..., "problem": words or label, "values": {field: [value, ...]},
     "default": "0110", "rows": {
    "0000":time in ns or status,"0001":...
    }}
    ]}
"""

from __future__ import annotations

import dataclasses
import json
import string
from typing import TYPE_CHECKING, Any

import sqlalchemy

from portattn.errors import TuningError
from portattn.tuning_db import schema
from portattn.tuning_db.key import ProblemKey
from portattn.tuning_db.snapshot import check_params, key_from_values, parse_params

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.backends.base import Config, ConfigValue
    from portattn.tuning_db.store import Store

FORMAT, VERSION = "portattn-oracle", 1
MAX_CHARS = 64 << 20
_MAX_NS = 2**62
_DIGITS = string.digits + string.ascii_letters
_A_LINE = 8  # rows


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """What was measured of one kernel on one problem.

    Attributes:
        kernel, backend: the kernel.
        problem: its words for `cases.parse`, or its label.
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
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise TuningError(
            f"the recorded times cannot be read: {type(error).__name__}: {str(error)[:200]}"
        ) from error


def _table(values: Mapping[str, Any]) -> Table:
    kernel, backend, problem = (values[name] for name in ("kernel", "backend", "problem"))
    columns = values["values"]
    if not all(isinstance(text, str) for text in (kernel, backend, problem, *columns)):
        raise ValueError("kernel, backend, problem and fields are texts")
    fields = tuple(columns)
    outcomes: dict[tuple[ConfigValue, ...], int | str] = {}
    for digits, outcome in values["rows"].items():
        is_time = type(outcome) is int and 0 < outcome < _MAX_NS
        if not is_time and outcome not in schema.STATUSES:
            raise ValueError(f"{str(outcome)[:60]!r} is neither a time in ns nor a status")
        outcomes[_config(columns, digits)] = outcome
    default = _config(columns, values["default"])
    if not isinstance(outcomes.get(default), int):
        raise ValueError("the default has no time")
    return Table(kernel, backend, problem, fields, default, outcomes)


def _config(columns: Mapping[str, Any], digits: str) -> tuple[ConfigValue, ...]:
    """The values that a row's digits stand for."""
    found = {
        name: values[_DIGITS.index(digit)]
        for (name, values), digit in zip(columns.items(), digits, strict=True)
    }
    return tuple(check_params(found).values())


def dump(device: str, tables: Sequence[Table]) -> str:
    """The text of a file.

    Raises:
        TuningError: a field has more values than there are digits.
    """
    parts = []
    for table in tables:
        columns = {
            name: sorted(set(values), key=lambda value: (str(type(value)), value))
            for name, values in zip(table.fields, zip(*table.outcomes, strict=True), strict=True)
        }
        most = max((len(values) for values in columns.values()), default=0)
        if most > len(_DIGITS):
            raise TuningError(
                f"a field of {table.kernel} has {most} values; at most {len(_DIGITS)} are recorded"
            )
        digits = {
            config: "".join(
                _DIGITS[values.index(value)]
                for values, value in zip(columns.values(), config, strict=True)
            )
            for config in table.outcomes
        }
        head = {
            "kernel": table.kernel,
            "backend": table.backend,
            "problem": table.problem,
            "values": columns,
            "default": digits[table.default],
        }
        rows = sorted(
            f'"{digits[config]}":{json.dumps(outcome)}'
            for config, outcome in table.outcomes.items()
        )
        lines = [",".join(rows[index : index + _A_LINE]) for index in range(0, len(rows), _A_LINE)]
        parts.append(json.dumps(head)[:-1] + ', "rows": {\n' + ",\n".join(lines) + "\n}}")
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
