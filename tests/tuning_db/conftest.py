"""Results to store, and a database of one's own."""

import dataclasses

import pytest

from portattn.device import DeviceKey
from portattn.problem import AttentionProblem
from portattn.tuning_db import lookup
from portattn.tuning_db.identity import toolchain_class
from portattn.tuning_db.key import bucket
from portattn.tuning_db.records import (
    KernelResult,
    Measurement,
    ProblemResult,
    Subject,
    Timing,
)
from portattn.tuning_db.store import Store

PROBLEM = AttentionProblem("cpu", "float32", 1, 8, 8, 1024, 1024, 64, 64)
DEVICE = DeviceKey("cpu", "GenuineIntel", "a processor", "x86_64-v4", 2, 2, isa=("avx2", "fma"))


def timing(median_ns):
    return Timing(
        median_ns, median_ns - 1, median_ns + 1, median_ns, 2, 9, median_ns - 1, median_ns + 1
    )


def result(
    params=None,
    median_ns=1000,
    *,
    problem=PROBLEM,
    device=DEVICE,
    kernel="cpu_forward",
    source="a" * 64,
    toolchain=None,
    default_ns=2000,
    expected_rev=0,
):
    """One problem with one kernel: the default, one faulty config, and the best."""
    best = Measurement(
        params or {"block_q": 32, "pack": True}, 1, "ok", timing(median_ns), default_ns, 1e-7, 1e-6
    )
    tried = (
        Measurement({"block_q": 16, "pack": False}, 0, "ok", timing(default_ns), compile_ns=5),
        Measurement(
            {"block_q": 64, "pack": False},
            0,
            "wrong_result",
            max_abs_err=float("inf"),
            error="é " * 3000,
        ),
        best,
    )
    kernel_result = KernelResult(
        kernel,
        "cpu",
        toolchain or toolchain_class("cpu"),
        source,
        "b" * 64,
        tried,
        best,
        2,
        "rule",
        expected_rev,
    )
    return ProblemResult(
        device, bucket(problem), {"seqlen_q": problem.seqlen_q}, "eager_warm", (kernel_result,)
    )


@pytest.fixture
def make_result():
    return result


@pytest.fixture
def problem():
    return PROBLEM


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def vary():
    return dataclasses.replace


@pytest.fixture
def database(tmp_path, monkeypatch):
    """The path that PORTATTN_DB names; nothing is there yet."""
    path = tmp_path / "folder" / "tuning.db"
    monkeypatch.setenv("PORTATTN_DB", str(path))
    lookup.reload()
    yield path
    monkeypatch.undo()
    lookup.reload()


@pytest.fixture
def store(database):
    return Store()


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request, database, monkeypatch):
    """The location of an empty database of either kind, which PORTATTN_DB names."""
    if request.param == "sqlite":
        yield str(database)
        return
    url = request.getfixturevalue("postgresql").database()
    monkeypatch.setenv("PORTATTN_DB", url)
    lookup.reload()
    yield url


@pytest.fixture
def subject():
    return subject_of(result())


def subject_of(result):
    """What the first kernel of a result was measured on."""
    kernel = result.kernels[0]
    identity = (kernel.kernel_name, kernel.backend, kernel.source_sha256, kernel.space_sha256)
    return Subject(result.device, result.key, result.shape, result.policy, *identity)


def tried(number, median_ns=1000, round=0):
    """A measurement of a config that no other number has."""
    return Measurement({"block_q": 16, "number": number}, round, "ok", timing(median_ns), 2000)


@pytest.fixture
def fill(store):
    """Store results as one run."""

    def fill_with(*results):
        run_id = store.begin_run(effort="test", seed=0, budget={})
        for one in results:
            store.record(run_id, one)
        lookup.reload()
        return run_id

    return fill_with
