"""Recorded times: the file, the device they stand for, and searches on them."""

import itertools
import json

import pytest

from portattn.errors import TuningError
from portattn.tuner import oracle, replay, simulate, tune
from portattn.tuner.search import STRATEGIES
from portattn.tuning_db import lookup

SIZES = (16, 32, 48, 64, 80, 96, 112, 128)


def table(kernel="recorded_forward", scale=1, sizes=SIZES):
    """384 configs with one narrow optimum and a stretch that does not compile."""
    outcomes = {}
    for q, k, stages, flag in itertools.product(sizes, sizes, (1, 2, 3), (False, True)):
        time = 1000 + abs(q - 112) + abs(k - 32) + 50 * flag + 70 * (stages != 2)
        fails = q * k * stages > 128 * 96 * 2
        outcomes[q, k, stages, flag] = "resource" if fails else time * 1000 * scale
    fields = ("block_q", "block_k", "num_stages", "pack")
    return oracle.Table(kernel, "cpu", "p", fields, (64, 64, 1, False), outcomes)


def test_a_file_is_read_as_it_was_written():
    text = oracle.dump("a device", [table(), table("other_forward", 2)])
    assert oracle.dump(*oracle.load(text)) == text
    assert oracle.load(text)[1][0] == table()
    assert table().optimum_ns == 1_000_000


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"version": 2},
        {"tables": 3},
        {"tables": [{"kernel": "k"}]},
        {"rows": {"0": "fast"}},
        {"rows": {"0": -5}},
        {"rows": {"0": True}},
        {"rows": {"00": 3}},
        {"rows": {"1": 3}},
        {"rows": {"-": 3}},
        {"rows": [["0", 3]]},
        {"values": [1]},
        {"values": {"x": [[]]}},
        {"values": {"x": [1.5]}},
        {"default": 0},
    ],
)
def test_anything_else_is_refused(change):
    one = {"kernel": "k", "backend": "b", "problem": "p", "values": {"x": [1]}, "default": "0",
           "rows": {"0": 5}}  # fmt: skip
    content = {"format": "portattn-oracle", "version": 1, "device": "d", "tables": [one]}
    assert len(oracle.load(json.dumps(content))[1]) == 1
    (one if set(change) & set(one) else content).update(change)
    with pytest.raises(TuningError, match="cannot be read"):
        oracle.load(json.dumps(content))
    with pytest.raises(TuningError, match="cannot be read"):
        oracle.load("[" * 100_000)


def test_the_driver_finds_the_optimum_of_a_recorded_device(case, store):
    tables = [table(), table("other_forward", 2)]
    kernels = [replay.kernel_of(one) for one in tables]
    executor = replay.ReplayExecutor(tables, noise=0.005, seed=1)
    report = tune([case], kernels=kernels, executor=executor, store=store, most=120).problems[0]
    assert report.fastest == "recorded_forward"
    for kernel in report.kernels:
        assert kernel.tried == 120
        assert kernel.gain == pytest.approx(1.15, rel=0.02)
        assert {status for _, status, _ in kernel.rejected} <= {"resource"}
    assert len(executor.attempts) == len(set(executor.attempts)) == 240
    device, recorded = oracle.from_store(store)
    assert device
    first = next(one for one in recorded if one.kernel == "recorded_forward")
    default = {"block_q": 64, "block_k": 64, "num_stages": 1, "pack": False}
    assert dict(zip(first.fields, first.default, strict=True)) == default
    assert len(first.outcomes) == 120
    for values, outcome in first.outcomes.items():
        named = dict(zip(first.fields, values, strict=True))
        truth = table().outcomes[tuple(named[name] for name in table().fields)]
        assert outcome == truth or outcome == pytest.approx(truth, rel=0.02)


def test_faults_end_the_config_and_stay_in_quarantine(case, store):
    small = table(sizes=(32, 48, 64, 112))
    kernel = replay.kernel_of(small)
    executor = replay.ReplayExecutor(
        [small], fault=lambda config: "crash" if config.block_k == 32 else ""
    )
    options = {"kernels": [kernel], "executor": executor, "store": store}
    report = tune([case], **options).problems[0].kernels[0]
    assert report.tried == report.feasible == 96
    assert report.params["block_k"] == 48  # the best of those that do not crash
    crashed = [params for params, status, _ in report.rejected if status == "crash"]
    assert len(crashed) == 24
    executor.attempts.clear()
    again = tune([case], **options).problems[0].kernels[0]
    assert again.tried == len(executor.attempts) == 96 - 24
    assert again.params == report.params


def test_the_search_beats_chance_and_tpe_on_a_recorded_device():
    found = {
        name: simulate.summarise(simulate.courses([table()], name, 60, seeds=8), 60)
        for name in STRATEGIES
    }
    assert found["portattn"].median >= 0.99
    assert found["portattn"].low >= max(found["random"].low, found["tpe"].low - 0.01)
    with pytest.raises(TuningError, match="runs on a ReplayExecutor only"):
        replay.kernel_of(table()).run(None, None)


def test_lookup_knows_the_winner(case, store):
    from portattn.device import device_key

    small = table(sizes=(32, 64, 112))
    executor = replay.ReplayExecutor([small])
    tune([case], kernels=[replay.kernel_of(small)], executor=executor, store=store)
    found = lookup.find("recorded_forward", case.problem, device_key("cpu"))
    assert found.params == {"block_q": 112, "block_k": 32, "num_stages": 2, "pack": False}


def worded(words, optimum):
    """A table of a problem in words; block_k is best at `optimum`."""
    outcomes = {(k,): 1000 + 2 * abs(k - optimum) for k in SIZES}
    return oracle.Table("recorded_forward", "cuda", words, ("block_k",), (16,), outcomes)


def test_untuned_problems_get_the_nearest_ones_config():
    from portattn.tuner import transfer

    tables = [
        worded("b1 h16 s4096 d64 float16", 112),
        worded("b1 h16 s2048 d64 float16", 96),
        worded("b1 h16 s2048 d64 float16 causal", 48),
        worded("a label~x", 48),
    ]
    found = transfer.leave_one_out(tables)
    assert [one.source for one in found] == [tables[1].problem, tables[0].problem, ""]
    assert [round(one.fraction, 4) for one in found] == [
        round(1000 / 1032, 4), round(1000 / 1032, 4), round(1000 / 1064, 4),
    ]  # fmt: skip
    assert found[0].default_fraction == pytest.approx(1000 / 1192)
    assert transfer.leave_one_out(tables, most=1)[0].source == ""


def test_the_command_writes_what_it_found(tmp_path):
    from typer.testing import CliRunner

    from portattn import cli

    recorded, out = tmp_path / "recorded.json", tmp_path / "out.json"
    tables = [worded("b1 h16 s4096 d64 float16", 112), worded("b1 h16 s2048 d64 float16", 96)]
    recorded.write_text(oracle.dump("a device", tables))
    words = [
        "bench-search",
        str(recorded),
        "--seeds",
        "2",
        "--evaluations",
        "8",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(cli.build("bench-search"), words)
    assert done.exit_code == 0, done.output
    assert "2 of 2 get 95 %" in done.output
    content = json.loads(out.read_text())
    assert [one["strategy"] for one in content["searches"]] == list(STRATEGIES)
    assert all(one["within_1"] == 1 for one in content["searches"])  # 8 configs: all were tried
    assert content["problems"][0]["worst"]["portattn"] == 1
    assert content["untuned"][0]["fraction"] == round(1000 / 1032, 4)


def test_a_kernel_that_hangs_again_and_again_is_left_alone(case, store):
    small = table(sizes=(32, 48, 64))
    executor = replay.ReplayExecutor(
        [small], fault=lambda config: "run_timeout" if config.block_q != 64 else ""
    )
    options = {"kernels": [replay.kernel_of(small)], "executor": executor, "store": store}
    report = tune([case], **options).problems[0].kernels[0]
    assert [status for _, status, _ in report.rejected] == ["run_timeout"] * 3
    assert report.params["block_q"] == 64
