"""Winners beside the default in another process: before they are stored, and later again."""

import json

import pytest
import torch

from portattn import cli
from portattn.backends import registry
from portattn.device import device_key
from portattn.errors import TuningError
from portattn.tuner import cases, measure, stored, timers
from portattn.tuner.confirm import confirm
from portattn.tuner.executor import Attempt, Executor
from portattn.tuner.verify import Verdict
from portattn.tuning_db import lookup, schema

NAME = "cpu_forward"


class Timed(Executor):
    """Takes times from a function of the config; some configs are not right."""

    def __init__(self, time_ns, wrong=()):
        self.policy, self.time_ns, self.wrong = "eager_warm", time_ns, wrong
        self.begun, self.is_closed = [], False

    def begin(self, case):
        self.begun.append(case)

    def attempt(self, kernel, config, best_ns):
        if config in self.wrong:
            return Attempt(Verdict("wrong_result", "output differs"))
        return Attempt(Verdict("ok"), (self.time_ns(config),) * 5)

    def rounds(self, entries, seconds, *, min_rounds):
        return [[self.time_ns(entry.config) + i for i in range(20)] for entry in entries]

    def close(self):
        self.is_closed = True


def threads_decide(config):
    """Every config is faster than the default by how much block_k differs from 64."""
    return 1_000_000 - 1000 * abs(config.block_k - 64)


@pytest.fixture
def problem():
    return cases.parse("b1 h2 s64 d16 float32 causal")


@pytest.fixture
def two(problem):
    kernel = registry.kernel(NAME)
    default = kernel.default_config(problem.problem)
    other = next(
        kernel.config_from_dict({**default.to_dict(), "block_k": size})
        for size in (32, 128, 256)
        if size != default.block_k
    )
    return kernel, default, other


def test_what_is_faster_slower_equal_or_wrong(two):
    kernel, default, other = two
    for factor, faster, slower in ((0.9, True, False), (1.0, False, False), (1.1, False, True)):
        executor = Timed(lambda config, f=factor: int(1e6 * (f if config == other else 1)))
        found = confirm(kernel, default, other, executor, 0.1)
        assert (found.is_faster, found.is_slower) == (faster, slower)
        assert f"{factor:.3f} of the default's time" in found.text
    failed = confirm(kernel, default, other, Timed(lambda config: 1, [other]), 0.1)
    assert failed.is_slower
    assert failed.text == "wrong_result: output differs"


@pytest.mark.parametrize("agrees", [True, False])
def test_a_winner_is_stored_if_it_wins_in_a_fresh_process_too(agrees, problem, store, monkeypatch):
    from portattn.tuner import tune as function

    module = __import__("importlib").import_module("portattn.tuner.tune")
    first = Timed(threads_decide)
    fresh = Timed(threads_decide if agrees else lambda config: 1_000_000)
    monkeypatch.setattr(module, "executor_for", lambda *arguments: first)
    monkeypatch.setattr(module, "RemoteExecutor", lambda device, policy: fresh)
    report = function([problem], kernels=[NAME], store=store, most=30, budget_seconds=20)
    kernel = report.problems[0].kernels[0]
    assert fresh.begun == [problem]
    assert fresh.is_closed
    assert kernel.kept_default is not agrees
    assert ("1.000 of the default's time" in kernel.unconfirmed) is not agrees
    found = lookup.find(NAME, problem.problem, device_key("cpu"))
    assert found.params == (kernel.params if agrees else {})
    with store.transaction() as connection:
        row = connection.execute(schema.best.select()).one()
    assert (row.confirm_median_ns is not None) == (row.confirm_default_ns is not None) == agrees


@pytest.fixture
def filled(problem, store, monkeypatch):
    """A best row that nobody measured for real."""
    from portattn.tuner import tune as function

    module = __import__("importlib").import_module("portattn.tuner.tune")
    monkeypatch.setattr(module, "executor_for", lambda *arguments: Timed(threads_decide))
    report = function(
        [problem], kernels=[NAME], store=store, most=30, budget_seconds=20, confirm=False
    )
    return report.problems[0].kernels[0]


def test_stored_rows_are_compared_in_a_process_of_their_own(filled, store, tmp_path):
    found = list(stored.confirm_stored(store, device_key("cpu"), "cpu", seconds=0.1))
    assert [row.kernel for row in found] == [NAME]
    assert found[0].status in ("faster", "equal", "slower")
    assert dict(found[0].params) == filled.params
    values = json.loads(stored.dump("here", found))["rows"][0]
    assert values["low"] <= values["ratio"] <= values["high"]


def test_bad_rows_are_told_and_old_ones_left_out(filled, store, monkeypatch, tmp_path):
    rate = {"factor": 2}

    def slow(device, policy):
        return Timed(
            lambda config: 1000 * (rate["factor"] if filled.params == config.to_dict() else 1)
        )

    monkeypatch.setattr(stored, "RemoteExecutor", slow)
    out = tmp_path / "rows.json"
    from typer.testing import CliRunner

    def run():
        return CliRunner().invoke(cli.build("confirm"), ["confirm", "--out", str(out)])

    done = run()
    assert done.exit_code == 1
    assert "1 slower" in done.output
    assert json.loads(out.read_text())["rows"][0]["status"] == "slower"
    rate["factor"] = 1
    assert run().exit_code == 0
    with store.transaction() as connection:
        connection.execute(schema.kernel.update().values(source_sha256="0" * 64))
    done = run()
    assert done.exit_code == 0
    assert "another kernel source" in done.output
    with store.transaction() as connection:
        connection.execute(schema.kernel.update().values(source_sha256="0" * 64))
        connection.execute(schema.best.update().values(kernel_name="gone"))
    assert "no such kernel" in run().output


def test_policies_are_part_of_what_is_stored(problem, store, monkeypatch):
    from portattn.tuner import tune as function

    for policy in timers.POLICIES["cpu"]:
        function([problem], kernels=[NAME], store=store, most=2, budget_seconds=5, policy=policy)
    with store.transaction() as connection:
        policies = {row.policy for row in connection.execute(schema.best.select())}
    assert policies == {"eager_warm", "eager_cold"}
    with pytest.raises(TuningError, match="policy is 'graph_cold'; on cpu it must be one of"):
        function([problem], store=store, policy="graph_cold")
    with pytest.raises(TuningError, match="'cpu' and 'cuda' devices"):
        timers.policy_for("mps")


def test_cold_runs_are_timed_alone():
    told = []
    timer = timers.timer_for("cpu", "eager_cold")
    assert timer.sample(lambda: told.append(1), 5) > 0
    assert len(told) == 3
    assert timer.policy == "eager_cold"


def test_paired_samples_give_a_ratio_and_its_interval():
    other = [1000 + 10 * i for i in range(40)]
    found = measure.ratio([int(0.9 * x) for x in other], other)
    assert found.low <= found.median <= found.high
    assert found.median == pytest.approx(0.9, abs=0.002)
    assert measure.is_faster([int(0.9 * x) for x in other], other)
    assert not measure.is_faster([int(0.995 * x) for x in other], other)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", timers.POLICIES["cuda"])
def test_a_gpu_times_under_every_policy(policy):
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    timer = timers.timer_for("cuda", policy)

    def run():
        return a @ a

    timer.sample(run, 3)
    repeats = timer.repeats_for(timer.sample(run, 1))
    assert 5_000 < timer.sample(run, repeats) < 5_000_000
