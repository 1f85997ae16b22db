"""The database as JSON text and back. Export, import and export again gives the same bytes.

The text lists each table's rows sorted by what identifies them; references are positions in the
lists. What is local to one database is left out: row numbers, revisions, and whether a best row
was tuned here or imported.

Merging keeps, of two rows with the same identity, the first in a fixed order (`_order`): of best
rows the faster one. So it matters neither in which order files are merged nor how often.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, NoReturn

import sqlalchemy

from portattn.errors import TuningError
from portattn.tuning_db import schema
from portattn.tuning_db.identity import canonical_json, sha256
from portattn.tuning_db.rows import dialect_insert, has_written
from portattn.tuning_db.snapshot import REVISIONS, check_params

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from portattn.tuning_db.store import Store

FORMAT = "portattn-tuning"
VERSION = 1
MAX_CHARS = 64 << 20
MAX_ROWS = 500_000
_MAX_INT = 2**62


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """One table in the file: what identifies a row, what it refers to, what stays behind."""

    table: sqlalchemy.Table
    unique: tuple[str, ...]
    references: Mapping[str, str] = dataclasses.field(default_factory=dict)
    local: tuple[str, ...] = ("id",)
    added: tuple[str, ...] = ()  # nullable columns that files of the first schema do not have

    @property
    def columns(self) -> list[sqlalchemy.Column[Any]]:
        """The columns that are values in the file."""
        return [
            c
            for c in self.table.columns
            if c.name not in self.local and c.name not in self.references
        ]


# In an order in which references are known before they are used.
_PARTS = (
    _Part(schema.device, ("fp_sha256",)),
    _Part(schema.toolchain, ("fp_sha256",)),
    _Part(schema.kernel, ("name", "backend", "source_sha256", "space_sha256")),
    _Part(schema.problem, ("key_sha256",)),
    _Part(schema.config, ("kernel_id", "params_sha256"), {"kernel_id": "kernel"}),
    _Part(schema.run, ("id",), local=("fence", "work_sha256")),
    _Part(
        schema.measurement,
        ("run_id", "device_id", "config_id", "problem_id", "shape_sha256", "policy", "round"),
        {
            "device_id": "device",
            "toolchain_id": "toolchain",
            "config_id": "config",
            "problem_id": "problem",
            "run_id": "run",
        },
        local=("id", "shape_sha256"),
    ),
    _Part(
        schema.best,
        ("device_id", "toolchain_class", "kernel_name", "problem_id", "policy"),
        {"device_id": "device", "problem_id": "problem", "config_id": "config"},
        local=("rev", "source", "measurement_id"),
        added=("confirm_median_ns", "confirm_default_ns"),
    ),
)


def export_text(store: Store) -> str:
    """The whole database as JSON text that depends on its content only.

    Raises:
        TuningError: the database cannot be read, or holds what no tuner stores.
    """
    try:
        return _export(store)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TuningError(
            f"tuning database {store.location.shown} cannot be exported: a row is damaged "
            f"({type(error).__name__}: {str(error)[:200]}). Move it away and run `portattn tune`"
        ) from error


def _export(store: Store) -> str:
    with store.transaction() as connection:
        return text_of(lambda table: connection.execute(sqlalchemy.select(table)).mappings())


def text_of(rows_of: Callable[[sqlalchemy.Table], Iterable[Any]]) -> str:
    """The text of a file with these rows of each table; some error if one is damaged."""
    tables: dict[str, list[dict[str, Any]]] = {}
    positions: dict[str, dict[Any, int]] = {}
    for part in _PARTS:
        rows = []
        for raw in rows_of(part.table):
            row = {c.name: raw[c.name] for c in part.columns}
            row |= {name: positions[target][raw[name]] for name, target in part.references.items()}
            identity = tuple(row[name] if name in row else raw[name] for name in part.unique)
            rows.append((identity, raw.get("id"), row))
        rows.sort(key=lambda entry: entry[0])
        positions[part.table.name] = {row_id: index for index, (_, row_id, _) in enumerate(rows)}
        tables[part.table.name] = [row for _, _, row in rows]
    content = {"format": FORMAT, "version": VERSION, "schema": schema.HEAD, "tables": tables}
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _refuse(problem: str) -> NoReturn:
    raise TuningError(
        f"the file cannot be imported: {problem}. Export it again with `portattn export-db`"
    )


def _no_constant(text: str) -> NoReturn:
    _refuse(f"it holds the number {text}")


def _check_value(column: sqlalchemy.Column[Any], value: object, where: str) -> None:
    """One value against its column's type and bounds."""
    if value is None and column.nullable:
        return
    kind = column.type
    if isinstance(kind, sqlalchemy.Boolean):
        valid = type(value) is bool
    elif isinstance(kind, sqlalchemy.Integer):
        valid = type(value) is int and abs(value) < _MAX_INT
    elif isinstance(kind, sqlalchemy.Float):
        valid = isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
    else:
        length = kind.length if isinstance(kind, sqlalchemy.String) and kind.length else 65535
        valid = type(value) is str and len(value) <= length and "\0" not in value
    if not valid:
        _refuse(f"{where}.{column.name} is {str(value)[:60]!r}, which does not fit {kind}")


def _check_meaning(name: str, row: Mapping[str, Any], where: str) -> None:
    """What a row must satisfy beyond its types."""
    for column, value in row.items():
        if (
            column.endswith("_json")
            and canonical_json(json.loads(value, parse_constant=_no_constant)) != value
        ):
            _refuse(f"{where}.{column} is not canonical JSON")
    if name == "problem":
        key = {column: value for column, value in row.items() if column != "key_sha256"}
        if sha256(key) != row["key_sha256"]:
            _refuse(f"{where}.key_sha256 is not that of its columns")
    elif (
        name == "config"
        and sha256(check_params(json.loads(row["params_json"]))) != row["params_sha256"]
    ):
        _refuse(f"{where}.params_sha256 is not that of its params")
    elif name == "measurement" and row["status"] not in schema.STATUSES:
        _refuse(
            f"{where}.status is {row['status']!r}; it must be one of {', '.join(schema.STATUSES)}"
        )
    elif name == "best" and min(row["median_ns"], row["default_ns"]) <= 0:
        _refuse(f"{where} has a time that is not positive")


def _parse(text: str) -> dict[str, list[dict[str, Any]]]:
    """The tables of an exported file, every value checked."""
    if len(text) > MAX_CHARS:
        _refuse(f"it has {len(text)} characters; at most {MAX_CHARS} are taken")
    content = json.loads(text, parse_constant=_no_constant)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        _refuse(f"it is not a {FORMAT} file")
    if content.get("version") != VERSION or content.get("schema") not in REVISIONS:
        found = f"version {content.get('version')!s:.20} and schema {content.get('schema')!s:.20}"
        _refuse(f"it has {found}; version {VERSION} and schemas {', '.join(REVISIONS)} are taken")
    tables = content.get("tables")
    if not isinstance(tables, dict) or set(tables) != {part.table.name for part in _PARTS}:
        _refuse(f"'tables' must hold exactly {', '.join(part.table.name for part in _PARTS)}")
    for part in _PARTS:
        rows = tables[part.table.name]
        if not isinstance(rows, list) or len(rows) > MAX_ROWS:
            _refuse(f"table {part.table.name} is not a list of at most {MAX_ROWS} rows")
        for index, row in enumerate(rows):
            if content["schema"] == REVISIONS[0] and isinstance(row, dict):
                rows[index] = row = {**dict.fromkeys(part.added), **row}
            _check_row(part, row, tables, f"{part.table.name}[{index}]")
    return tables


def _check_row(part: _Part, row: object, tables: Mapping[str, list[Any]], where: str) -> None:
    columns = part.columns
    names = {column.name for column in columns} | set(part.references)
    if not isinstance(row, dict) or set(row) != names:
        _refuse(f"{where} must be an object with exactly the fields {', '.join(sorted(names))}")
    for column in columns:
        _check_value(column, row[column.name], where)
    for name, target in part.references.items():
        if type(row[name]) is not int or not 0 <= row[name] < len(tables[target]):
            _refuse(f"{where}.{name} does not name a row of {target}")
    _check_meaning(part.table.name, {column.name: row[column.name] for column in columns}, where)


def import_text(store: Store, text: str) -> dict[str, int]:
    """Merge an exported file into the database, in one transaction.

    Of two best rows the faster one stays. Merging is commutative, associative and idempotent.

    Args:
        store: where to.
        text: of `export_text`, from this or another machine.

    Returns:
        How many rows of each table were new or replaced one.

    Raises:
        TuningError: the text is not such a file; nothing is changed then.
    """
    try:
        tables = _parse(text)
    except (ValueError, RecursionError) as error:
        _refuse(f"{type(error).__name__}: {str(error)[:200]}")
    added: dict[str, int] = {}
    ids: dict[str, list[Any]] = {}
    with store.transaction() as connection:
        for part in _PARTS:
            found = [_merge(connection, part, row, ids) for row in tables[part.table.name]]
            added[part.table.name] = sum(changed for _, changed in found)
            ids[part.table.name] = [row_id for row_id, _ in found]
    return added


def _merge(
    connection: sqlalchemy.Connection,
    part: _Part,
    row: dict[str, Any],
    ids: Mapping[str, list[Any]],
) -> tuple[Any, bool]:
    """Add a row, or let it replace the one with its identity; its id, and whether it changed it.

    The tables' rows that refer to others have no id that anything refers to.
    """
    table = part.table
    references = {name: ids[target][row[name]] for name, target in part.references.items()}
    values = {**row, **references}
    if table is schema.measurement:
        values["shape_sha256"] = hashlib.sha256(row["shape_json"].encode()).hexdigest()
    if table is schema.best:
        values |= {"source": "import", "measurement_id": None}
    first = {"rev": 1} if table is schema.best else {}
    insert = dialect_insert(connection, table).values({**values, **first})
    is_new = has_written(connection, insert.on_conflict_do_nothing(index_elements=part.unique))
    here = sqlalchemy.and_(*(table.c[name] == values[name] for name in part.unique))
    query = sqlalchemy.select(table).where(here).with_for_update()
    present = dict(connection.execute(query).mappings().one())
    row_id = present.get("id")
    if is_new or _order(connection, part, present) <= _order(connection, part, values):
        return row_id, is_new
    changed = {name: value for name, value in values.items() if name not in part.unique}
    if table is schema.best:
        changed["rev"] = present["rev"] + 1
    connection.execute(table.update().where(here).values(changed))
    return row_id, True


def _order(
    connection: sqlalchemy.Connection, part: _Part, values: Mapping[str, Any]
) -> tuple[int, str]:
    """Of two rows with the same identity, the smaller one stays, in every database."""
    first = 0
    if part.table is schema.best:
        first = values["median_ns"]
    elif part.table is schema.run:
        first = -values["heartbeat_us"]  # the later news of a run
    content = {c.name: values[c.name] for c in part.columns}
    if part.table is schema.best:  # its config is content; ids differ between databases
        query = sqlalchemy.select(schema.config.c.params_sha256, schema.kernel.c.source_sha256)
        query = query.join(schema.kernel, schema.kernel.c.id == schema.config.c.kernel_id)
        query = query.add_columns(schema.kernel.c.space_sha256)
        query = query.where(schema.config.c.id == values["config_id"])
        content["config"] = list(connection.execute(query).one())
    elif part.table is schema.measurement:
        query = sqlalchemy.select(schema.toolchain.c.fp_sha256)
        query = query.where(schema.toolchain.c.id == values["toolchain_id"])
        content["toolchain"] = connection.execute(query).scalar_one()
    return first, canonical_json(content)
