"""What ``portattn tune`` was asked to tune, and where its trials are copied to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from portattn.tuner import Case
    from portattn.tuner.sources import Found
    from portattn.tuning_db.store import Store


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """The options that say what to tune.

    Attributes:
        problems, presets, models: texts.
        file: of problems.
        missed, stale: take what the database knows of.
        min_count: of a missed problem.
        database: where it is; None for the default.
        family: of other machines' devices, for the jobs of a fleet; None for this machine's.
    """

    problems: tuple[str, ...] = ()
    file: Path | None = None
    presets: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    missed: bool = False
    stale: bool = False
    min_count: int = 1
    database: str | None = None
    family: str | None = None

    def cases(self, device: str) -> list[Case]:
        """The problems on a torch device, each once; says which of the database's were left out.

        Empty only if `missed` or `stale` alone were asked for, and there is nothing.

        Raises:
            TuningError: a text, a file or the database cannot be used.
        """
        from portattn.tuner import cases, sources
        from portattn.tuner.models import model_cases
        from portattn.tuner.presets import preset

        found = [cases.parse(text, device) for text in self.problems]
        for name in self.presets:
            found += preset(name, device)
        for name in self.models:
            found += model_cases(name, device)
        if self.file is not None:
            found += sources.read_file(self.file, device)
        if self.missed or self.stale:
            found += self._known(device)
        elif not found:
            found = cases.defaults(device)
        return list(dict.fromkeys(found))

    def _known(self, device: str) -> list[Case]:
        from portattn.cli.database import existing
        from portattn.device import device_key
        from portattn.errors import TuningError
        from portattn.tuner import sources

        store = existing(self.database)
        if self.stale and self.family is not None:
            raise TuningError(
                "--stale compares with the kernels of this machine's devices; leave out --family"
            )
        found: list[Found] = []
        if self.missed:
            where = self.family or device_key(device).fingerprint
            found.append(sources.missed(store, where, device, min_count=self.min_count))
        if self.stale:
            found.append(sources.stale(store, device_key(device), device))
        for one in found:
            for label, why in one.left_out.items():
                typer.echo(f"left out: {label}: {why}")
        return [case for one in found for case in one.cases]

    def forget(
        self, store: Store, device: str, cases: Iterable[Case], left: Iterable[str]
    ) -> None:
        """Missed problems that were tuned now are missed no more.

        Args:
            store: where they stand.
            device: torch device.
            cases: what was to be tuned.
            left: labels of those that the budget did not reach.
        """
        from portattn.device import device_key
        from portattn.tuning_db import missed
        from portattn.tuning_db.identity import sha256
        from portattn.tuning_db.key import bucket

        if not self.missed:
            return
        keys = [bucket(case.problem) for case in cases]
        skipped = set(left)
        done = [sha256(dataclasses.asdict(key)) for key in keys if key.label not in skipped]
        missed.forget(store, device_key(device).fingerprint, done)


def mirror_for(url: str | None, store: Store) -> Callable[[], int]:
    """What copies new trials to an Optuna storage; without a URL, what does nothing."""
    if url is None:
        return lambda: 0
    from portattn.tuner.mirror import Mirror

    return Mirror(url, store).update
