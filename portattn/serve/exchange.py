"""Best configs as JSON in the exchange format (`portattn.tuning_db.exchange`).

Measurements stay behind. `portattn import-db` merges it, and
`portattn.tuning_db.http_snapshot` reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from portattn.errors import TuningError
from portattn.tuning_db import schema
from portattn.tuning_db.exchange import text_of

if TYPE_CHECKING:
    import sqlalchemy

    from portattn.report.reader import Reader

MAX_ROWS = 20_000
_CACHED = 8


class TooManyError(TuningError):
    """More rows than one answer may have."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """The body of an answer, and what identifies it."""

    body: bytes
    etag: str


class Bests:
    """Answers about one database; the last few are kept while no best row changes.

    Args:
        reader: of the database.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._state: tuple[object, ...] = ()
        self._answers: dict[tuple[str, str], Answer] = {}

    def answer(self, device: str = "", family: str = "") -> Answer:
        """All best configs, or those of a device or a family.

        Args:
            device: a fingerprint; "" for any.
            family: such as ``"cuda-sm_90"``; "" for any.

        Raises:
            TooManyError: there are more than `MAX_ROWS`.
            TuningError: the database cannot be read now.
        """
        state = self._reader.state()
        with self._lock:
            if state != self._state:
                self._state = state
                self._answers.clear()
            if found := self._answers.get((device, family)):
                return found
        body = self._text(device, family).encode()
        made = Answer(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
        with self._lock:
            if state == self._state:
                if len(self._answers) >= _CACHED:
                    self._answers.clear()
                self._answers[device, family] = made
        return made

    def _text(self, device: str, family: str) -> str:
        d, best, config = schema.device, schema.best, schema.config
        wanted = select(best.c.config_id, best.c.problem_id, best.c.device_id)
        wanted = wanted.join(d, d.c.id == best.c.device_id)
        if device:
            wanted = wanted.where(d.c.fp_sha256 == device)
        if family:
            wanted = wanted.where(d.c.family == family)
        used = wanted.subquery()
        kernels = select(config.c.kernel_id).where(config.c.id.in_(select(used.c.config_id)))
        devices = select(used.c.device_id)
        queries: dict[sqlalchemy.Table, sqlalchemy.Select[Any]] = {
            d: select(d).where(d.c.id.in_(devices)),
            schema.kernel: select(schema.kernel).where(schema.kernel.c.id.in_(kernels)),
            schema.problem: select(schema.problem).where(
                schema.problem.c.id.in_(select(used.c.problem_id))
            ),
            config: select(config).where(config.c.id.in_(select(used.c.config_id))),
            best: select(*self._reader.best_columns()).where(best.c.device_id.in_(devices)),
        }
        with self._reader.at_once() as rows:

            def of_table(table: sqlalchemy.Table) -> list[dict[str, Any]]:
                if table not in queries:
                    return []  # toolchains, runs and measurements stay behind
                found = rows(queries[table].limit(MAX_ROWS + 1))
                if len(found) > MAX_ROWS:
                    raise TooManyError(
                        f"there are more than {MAX_ROWS} rows; ask for those of one device= or "
                        "family="
                    )
                return found

            try:
                return text_of(of_table)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise TuningError(f"a row of the database is damaged: {error}") from error
