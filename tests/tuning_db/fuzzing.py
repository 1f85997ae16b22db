"""Tuning databases and exports that chance or malice spoiled, and what must hold all the same.

`Fuzzer` makes the n-th one from a whole database with a few tuned rows; `check` opens it as
`portattn.attention` does, as the tuner does, and imports it. The number decides what is done; the
whole database differs from run to run in its run's id and its times.
"""

import contextlib
import dataclasses
import json
import random
import sqlite3
import warnings
from pathlib import Path

import torch

import portattn
from portattn import call
from portattn.backends import registry
from portattn.device import device_key
from portattn.errors import TuningError
from portattn.problem import AttentionProblem
from portattn.tuner import cases
from portattn.tuner import jobs as workers
from portattn.tuning_db import TuningDatabaseWarning, jobs, lookup, seeds, snapshot
from portattn.tuning_db.exchange import export_text, import_text
from portattn.tuning_db.identity import source_of_files, space_sha256, toolchain_class
from portattn.tuning_db.key import bucket
from portattn.tuning_db.records import KernelResult, Measurement, ProblemResult, Timing
from portattn.tuning_db.store import Store
from tests.tuning_db.spoiling import FILES, Spoiler

TEXTS = ("text", "values", "job", "seeds")
KINDS = (*FILES, *TEXTS)
_KERNEL = "cpu_forward"
_SHAPE = (1, 2, 60, 32)
_CANARY = "portattn_was_here"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one spoiled database led to.

    Attributes:
        kind: of `KINDS`.
        used: the stored config ran; else the default did.
        messages: the warnings.
    """

    kind: str
    used: bool
    messages: tuple[str, ...]


class Fuzzer:
    """Makes and checks spoiled databases.

    Args:
        folder: for files; empty.
        monkeypatch: sets PORTATTN_DB.
    """

    def __init__(self, folder: Path, set_database) -> None:
        self._folder, self._set_database = folder, set_database
        self._canary = folder / _CANARY
        generator = torch.Generator().manual_seed(0)
        self._tensors = [torch.randn(_SHAPE, generator=generator) for _ in range(3)]
        self._right = portattn.attention(*self._tensors, is_causal=True, backend="reference")
        self.problem = portattn.explain(*self._tensors, is_causal=True).problem
        path = folder / "whole.db"
        Store(path)
        self._empty = path.read_bytes()
        self._params = self._tune(path)
        self._whole = path.read_bytes()
        self._spoiler = Spoiler(self._whole, self._canary)
        self._text = export_text(Store(path))
        self._seeds = seeds.dump(device_key("cpu").family, snapshot.read(_location(path)).rows)
        case = cases.parse("b1 h2 s60 d32 float32 longformer:8:2 offset:4")
        self._job = json.dumps(case.to_json())

    def _tune(self, path: Path) -> dict[str, object]:
        """Store a config that is not the default for the problem, and some more rows."""
        kernel = registry.kernel(_KERNEL)
        default = kernel.default_config(self.problem).to_dict()
        params = next(
            params
            for name, choices in kernel.search_space(self.problem).items()
            for choice in choices
            if choice != default[name]
            and not kernel.infeasible_reasons(
                self.problem, kernel.config_from_dict(params := {**default, name: choice})
            )
        )
        store = Store(path)
        run_id = store.begin_run(effort="fuzz", seed=0, budget={})
        for problem in (self.problem, *_others(self.problem)):
            store.record(run_id, _result(problem, params))
        store.finish_run(run_id, "done")
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return params

    def check(self, number: int) -> Finding:
        """Spoil the whole database in the way that the number says, and use it.

        Raises:
            AssertionError: something happened that must not.
        """
        chance = random.Random(number)
        kind = KINDS[number % len(KINDS)]
        path = self._folder / "spoiled.db"
        for old in self._folder.glob("spoiled.db*"):
            old.unlink()
        if kind in TEXTS:
            path.write_bytes(self._whole)
            self._check_texts(kind, chance, path)
        else:
            self._spoiler.file(kind, chance, path)
        finding = self._check_call(kind, path)
        if kind not in TEXTS:
            self._check_store(path)
        assert not self._canary.exists(), "data was run as code"
        return finding

    def _check_call(self, kind: str, path: Path) -> Finding:
        """The public call: right, without an exception, with one warning at most."""
        self._set_database(str(path))
        lookup.reload()
        call.clear_cache()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                output = portattn.attention(*self._tensors, is_causal=True)
            known = lookup.find(_KERNEL, self.problem, device_key("cpu"))
            state = lookup.status()
        assert (output - self._right).abs().max() < 1e-5
        messages = tuple(str(one.message) for one in caught)
        assert all(one.category is TuningDatabaseWarning for one in caught), messages
        assert len(messages) <= 1, messages
        if state.state != "ok":
            assert known is None, known
            assert len(messages) == 1, state
        used = known is not None and known.params == self._params
        return Finding(kind, used, messages)

    def _check_store(self, path: Path) -> None:
        """The tuner: it works, or says why not."""
        with contextlib.suppress(TuningError):
            store = Store(path, busy_seconds=0.2)
            run_id = store.begin_run(effort="fuzz", seed=1, budget={}, work="w")
            key, kernel = bucket(self.problem), registry.kernel(_KERNEL)
            store.incumbent(
                device_key("cpu"), key, _KERNEL, toolchain_class(kernel.backend), "eager_warm"
            )
            store.record(run_id, _result(self.problem, self._params))
            store.finish_run(run_id, "done")
            empty = path.with_name("spoiled.db2")
            empty.write_bytes(self._empty)
            text = export_text(store)
            import_text(Store(empty), text)

    def _check_texts(self, kind: str, chance: random.Random, path: Path) -> None:
        """Exports, jobs and seeds: taken or refused whole, never anything else."""
        if kind in ("text", "values"):
            spoil = self._spoiler.text if kind == "text" else self._spoiler.values
            text = spoil(chance, self._text)
            store = Store(path)
            before = export_text(store)
            try:
                import_text(store, text)
            except TuningError:
                assert export_text(store) == before
        elif kind == "job":
            spoil = chance.choice((self._spoiler.text, self._spoiler.values))
            options = self._spoiler.values(chance, '{"most": 5, "seed": 1}')
            lease = jobs.Lease(1, 1, "cpu", "", spoil(chance, self._job), options, 1)
            with contextlib.suppress(TuningError):
                case, _ = workers.read(lease, "cpu")
                bucket(case.problem)
        else:
            spoil = chance.choice((self._spoiler.text, self._spoiler.values))
            with contextlib.suppress(ValueError, RecursionError):  # what `load_all` catches
                seeds.parse(spoil(chance, self._seeds))


def _location(path: Path):
    from portattn.tuning_db.location import locate

    return locate(path)


def _others(problem: AttentionProblem) -> list[AttentionProblem]:
    return [dataclasses.replace(problem, seqlen_k=length) for length in (16, 4096)]


def _result(problem: AttentionProblem, params) -> ProblemResult:
    kernel = registry.kernel(_KERNEL)
    best = Measurement(dict(params), 1, "ok", Timing(900, 890, 910, 900, 5, 9, 895, 905), 1000)
    tuned = KernelResult(
        _KERNEL,
        kernel.backend,
        toolchain_class(kernel.backend),
        source_of_files(tuple(str(file) for file in kernel.source_files())),
        space_sha256(kernel.search_space(problem)),
        (best,),
        best,
        3,
        "rule",
    )
    return ProblemResult(
        device_key("cpu"), bucket(problem), {"seqlen_q": 60}, "eager_warm", (tuned,)
    )
