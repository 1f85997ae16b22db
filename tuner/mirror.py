"""A copy of the trials in an Optuna storage, for optuna-dashboard to show while they are made.

Nothing is read back from it: the tuning database is what counts. One study for each device,
problem and kernel; a trial that was rejected is one that failed, with the reason as an attribute.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from typing import TYPE_CHECKING, Any

import optuna
import sqlalchemy

from portattn.backends import registry
from portattn.errors import TuningError
from portattn.tuner import sources
from portattn.tuning_db import schema
from portattn.tuning_db.key import ProblemKey
from portattn.tuning_db.location import locate
from portattn.tuning_db.snapshot import key_from_values, parse_params

if TYPE_CHECKING:
    from collections.abc import Mapping

    from optuna.distributions import BaseDistribution

    from portattn.tuning_db.store import Store

# Configs' integers are small; a distribution may not be narrower than a later trial's value.
_MOST = 1 << 20
_Choices = dict[str, tuple[str, ...]]
_KEY_COLUMNS = tuple(field.name for field in dataclasses.fields(ProblemKey))


class Mirror:
    """Copies what this process measures from now on.

    Args:
        url: an SQLAlchemy URL for Optuna's own tables; another database than the tuning database.
        store: where the tuner writes.

    Raises:
        TuningError: the storage cannot be opened, or is the tuning database.
    """

    def __init__(self, url: str, store: Store) -> None:
        if locate(url).url == store.location.url:
            raise TuningError(
                f"--optuna-storage is the tuning database {store.location.shown}; name another one"
            )
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._storage = optuna.storages.RDBStorage(url)
        except Exception as error:  # Optuna passes on what its drivers and migrations raise
            raise TuningError(
                f"--optuna-storage {locate(url).shown} cannot be opened: {type(error).__name__}: "
                f"{str(error)[:300]}. It is an SQLAlchemy URL, e.g. sqlite:///trials.db"
            ) from error
        self._store = store
        self._studies: dict[str, tuple[optuna.Study, _Choices]] = {}
        query = sqlalchemy.select(sqlalchemy.func.max(schema.measurement.c.id))
        with store.transaction() as connection:
            self._last = connection.execute(query).scalar_one() or 0

    def update(self) -> int:
        """Copy what was measured since the last time; how many trials that were."""
        rows = self._new_rows()
        for row in rows:
            self._last = row["id"]
            study, choices = self._study(row)
            study.add_trial(_trial(row, choices))
        return len(rows)

    def _new_rows(self) -> list[Mapping[str, Any]]:
        m, c, k, d, p = (
            *(schema.measurement, schema.config, schema.kernel),
            *(schema.device, schema.problem),
        )
        query = (
            sqlalchemy.select(
                *(m.c.id, m.c.policy, m.c.status, m.c.median_ns, m.c.error_text, m.c.max_abs_err),
                *(c.c.params_json, k.c.name.label("kernel_name"), d.c.name.label("device_name")),
                *(k.c.space_sha256, m.c.shape_json, d.c.kind.label("device_kind")),
                *(p.c[name] for name in _KEY_COLUMNS),
            )
            .join_from(m, c, c.c.id == m.c.config_id)
            .join(k, k.c.id == c.c.kernel_id)
            .join(d, d.c.id == m.c.device_id)
            .join(p, p.c.id == m.c.problem_id)
            .join(schema.run, schema.run.c.id == m.c.run_id)
            .where(
                m.c.id > self._last,
                m.c.round == 0,
                schema.run.c.pid == os.getpid(),
                schema.run.c.host.startswith(socket.gethostname()[:200], autoescape=True),
            )
            .order_by(m.c.id)
        )
        with self._store.transaction() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def _study(self, row: Mapping[str, Any]) -> tuple[optuna.Study, _Choices]:
        """The study of a row, and the values of its fields that are texts."""
        key = key_from_values([row[name] for name in _KEY_COLUMNS])
        where = f"{row['device_name']}, {row['policy']}, space {row['space_sha256'][:8]}"
        name = f"{row['kernel_name']}: {key.label} ({where})"[:512]
        if name not in self._studies:
            study = optuna.create_study(
                storage=self._storage, study_name=name, direction="minimize", load_if_exists=True
            )
            self._studies[name] = study, self._choices(row)
        return self._studies[name]

    def _choices(self, row: Mapping[str, Any]) -> _Choices:
        """Optuna wants to know all values of a text beforehand: those that the kernel declares."""
        if row["kernel_name"] not in registry.KERNELS:
            return {}
        device = "cpu" if row["device_kind"] == "cpu" else "cuda"
        try:
            problem = sources.from_shape(row, device).problem
        except (TuningError, ValueError, KeyError, TypeError):
            return {}  # the shape does not say enough: texts become attributes
        return {
            name: tuple(dict.fromkeys(value for value in values if isinstance(value, str)))
            for name, values in registry.kernel(row["kernel_name"]).search_space(problem).items()
        }


def _trial(row: Mapping[str, Any], choices: _Choices) -> optuna.trial.FrozenTrial:
    """A measurement as a finished trial; its value is in milliseconds."""
    params: dict[str, Any] = {}
    distributions: dict[str, BaseDistribution] = {}
    attributes: dict[str, Any] = {"status": row["status"], "error": row["error_text"]}
    for name, value in parse_params(row["params_json"]).items():
        if isinstance(value, bool):
            distributions[name] = optuna.distributions.CategoricalDistribution((False, True))
        elif isinstance(value, int) and abs(value) <= _MOST:
            distributions[name] = optuna.distributions.IntDistribution(-_MOST, _MOST)
        elif value in choices.get(name, ()):
            distributions[name] = optuna.distributions.CategoricalDistribution(choices[name])
        else:
            attributes[name] = value
            continue
        params[name] = value
    if row["max_abs_err"] is not None:
        attributes["max_abs_err"] = row["max_abs_err"]
    is_timed = row["status"] == "ok" and row["median_ns"] is not None
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.COMPLETE if is_timed else optuna.trial.TrialState.FAIL,
        value=row["median_ns"] / 1e6 if is_timed else None,
        params=params,
        distributions=distributions,
        user_attrs=attributes,
    )
