"""Resuming, and workers of the fleet, on the CPU's own kernels."""

import dataclasses
import json
import threading
import time

import pytest
import sqlalchemy

from portattn.cli import main
from portattn.device import device_key
from portattn.errors import TuningError
from portattn.tuner import cases, jobs, tune
from portattn.tuning_db import jobs as table
from portattn.tuning_db import lookup, schema
from portattn.tuning_db.store import LostRunError, Store

FAMILY = device_key("cpu").family
QUICK = {"most": 2, "budget_seconds": 5}


def rows(store, table):
    with store.transaction() as connection:
        return [dict(row) for row in connection.execute(sqlalchemy.select(table)).mappings()]


class Stop(BaseException):
    """As if the process ended here, but for what runs on the way out."""


def stop_after(store, count):
    """Make a store end the tuning after so many measurements."""
    add, left = store.add, [count]

    def adding(*arguments):
        number = add(*arguments)
        left[0] -= 1
        if not left[0]:
            raise Stop
        return number

    store.add = adding


def test_a_stopped_run_goes_on_where_it_was(fake_kernel, fake_timer, case, store):
    other = cases.parse("b1 h2 s100 d16 float32")
    kernel = fake_kernel()
    options = {"kernels": [kernel], "timer": fake_timer(kernel), "budget_seconds": 30, "most": 12}
    stop_after(store, 15)  # in the second problem
    with pytest.raises(Stop):
        tune([case, other], store=store, **options)
    measured = rows(store, schema.measurement)
    assert [row["round"] for row in measured].count(0) == 15
    kernel.runs.clear()
    again = Store(store.location.url)
    report = tune([case, other], store=again, **options)
    assert report.resumed == ("b1 h2 s64 d16 float32 causal",)
    assert report.left_out == ()
    assert [one.label for one in report.problems] == ["b1 h2 s128 d16 float32 dense"]
    assert report.problems[0].kernels[0].tried == 12
    now = rows(store, schema.measurement)
    assert now[: len(measured)] == measured
    assert [row["round"] for row in now].count(0) == 24
    assert len({row["run_id"] for row in now}) == 1
    assert [row["state"] for row in rows(store, schema.run)] == ["done"]
    assert tune([case, other], store=again, **options).resumed == ()  # done: a run of its own
    assert len(rows(store, schema.run)) == 2


def test_no_resume_begins_anew(fake_kernel, fake_timer, case, store):
    kernel = fake_kernel()
    options = {"kernels": [kernel], "timer": fake_timer(kernel), "budget_seconds": 30, "most": 3}
    stop_after(store, 2)
    with pytest.raises(Stop):
        tune([case], store=store, **options)
    tune([case], store=Store(store.location.url), resume=False, **options)
    assert [row["state"] for row in rows(store, schema.run)] == ["failed", "done"]
    assert len({row["run_id"] for row in rows(store, schema.measurement)}) == 2


def test_a_worker_drains_the_table(store):
    problems = [cases.parse("b1 h2 s64 d32 float32 longformer:8:2"), cases.parse("h1 s40 d16")]
    assert jobs.submit(store, problems, FAMILY, options=QUICK) == 2
    assert jobs.submit(store, problems, FAMILY, options=QUICK) == 0
    assert jobs.submit(store, problems, "cuda-sm_90", kernels=["a", "b"]) == 4
    told = []
    finished = jobs.work(store, ["cpu"], told=told.append, options={"confirm": False})
    assert told == finished
    assert [one.state for one in finished] == ["done", "done"], finished
    assert table.counts(store) == {"queued": 4, "leased": 0, "done": 2, "failed": 0}
    lookup.reload()
    for case in problems:
        assert lookup.find("cpu_forward", case.problem, device_key("cpu")).rung == "exact"
    done = [row for row in rows(store, schema.job) if row["state"] == "done"]
    assert {row["run_id"] for row in done} == {row["id"] for row in rows(store, schema.run)}


def test_a_job_that_cannot_be_done_fails_and_says_why(store):
    for text, kernel in (("h1 s16 d16", "no_such"), ("h1 s16 d16 float16", "cupy_decode")):
        jobs.submit(store, [cases.parse(text)], FAMILY, kernels=[kernel], options=QUICK)
    finished = jobs.work(store, ["cpu"])
    assert [one.state for one in finished] == ["failed", "failed"]
    errors = [row["error_text"] for row in rows(store, schema.job)]
    assert "kernel is 'no_such'" in errors[0]
    assert "cupy_decode" in errors[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options_json": '{"budget_seconds": "5"}'}, "budget_seconds"),
        ({"options_json": '{"most": 0}'}, "most"),
        ({"options_json": '{"device": "cuda"}'}, "device"),
        ({"options_json": '{"policy": "rm -rf"}'}, "policy"),
        ({"options_json": "[]"}, "not an object"),
        ({"options_json": "[" * 100_000}, "RecursionError"),
        ({"case_json": "{}"}, "KeyError"),
        ({"case_json": '{"mask": null, "problem": []}'}, "TypeError"),
        ({"case_json": '{"mask": {"os": "system"}, "problem": {}}'}, "mask"),
        ({"dtype": "__class__"}, "dtype"),
        ({"features": ["system"]}, "feature"),
        ({"head_dim": 10**12}, "head_dim is 1000000000000"),
        ({"batch": True}, "batch is True"),
        ({"program": [1, 2, 3]}, "program"),
    ],
)
def test_a_damaged_job_is_refused(change, message):
    case = cases.parse("b1 h2 s64 d32 float32 longformer:8:2").to_json()
    columns = {"case_json": json.dumps(case), "options_json": "{}"}
    if set(change) <= set(columns):
        columns |= change
    else:
        columns["case_json"] = json.dumps({**case, "problem": {**case["problem"], **change}})
    lease = table.Lease(1, 1, FAMILY, "", attempts=1, **columns)
    with pytest.raises(TuningError, match=message):
        jobs.read(lease, "cpu")


def test_a_job_is_the_case_that_was_submitted(store):
    case = cases.parse("b1 h2 s64 d32 float32 longformer:8:2 kv_lengths lse offset:3")
    jobs.submit(store, [case], FAMILY, options={"seed": 3})
    lease = table.take(store, [FAMILY], "me")
    found, options = jobs.read(lease, "cuda:1")
    assert options == {"seed": 3}
    problem = dataclasses.replace(case.problem, device="cuda:1", device_type="cuda")
    assert found == cases.Case(problem, case.mask)


def test_a_worker_that_slept_over_its_lease_stores_nothing_more(
    store, fake_kernel, fake_timer, case
):
    kernel = fake_kernel()
    options = {"kernels": [kernel], "timer": fake_timer(kernel), "budget_seconds": 30, "most": 8}
    jobs.submit(store, [case], FAMILY)
    first = table.take(store, [FAMILY], "first", seconds=0.05)
    other = Store(store.location.url)
    add, seconds = store.add, []

    def adding(*arguments):
        number = add(*arguments)
        if not seconds and number == 4:
            time.sleep(0.06)  # no heartbeat: it slept
            seconds.append(table.take(other, [FAMILY], "second"))
        return number

    store.add = adding
    with pytest.raises(LostRunError):
        tune([case], store=store, lease=first, **options)
    assert len(rows(store, schema.measurement)) == 4
    assert rows(store, schema.best) == []
    report = tune([case], store=other, lease=seconds[0], **options)
    assert report.problems[0].kernels[0].tried == 8
    measured = [row["config_id"] for row in rows(store, schema.measurement) if row["round"] == 0]
    assert len(measured) == len(set(measured)) == 8


def test_a_long_job_keeps_its_lease(store, monkeypatch):
    def slow(problems, **options):
        time.sleep(0.6)

    monkeypatch.setattr(jobs, "tune", slow)
    jobs.submit(store, [cases.parse("h1 s16 d16")], FAMILY)
    others = []
    thread = threading.Thread(
        target=lambda: others.extend(jobs.work(store, ["cpu"], lease_seconds=0.3))
    )
    thread.start()
    time.sleep(0.45)
    assert table.take(Store(store.location.url), [FAMILY], "another") is None
    thread.join()
    assert [one.state for one in others] == ["done"]


def test_an_interrupted_worker_gives_its_job_back(store, monkeypatch):
    def interrupted(problems, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "tune", interrupted)
    jobs.submit(store, [cases.parse("h1 s16 d16")], FAMILY)
    with pytest.raises(KeyboardInterrupt):
        jobs.work(store, ["cpu"])
    again = table.take(store, [FAMILY], "another")
    assert again.attempts == 1


def test_the_command_line_queues_and_works(store, capsys):
    problem = ["--problem", "b1 h1 s32 d16 float32", "--device", "cpu", "--no-progress"]
    commands = [
        ["tune", "--enqueue", *problem, "--most", "1", "--budget", "5"],
        ["tune", "--enqueue", *problem],
        ["tune", "--enqueue", *problem, "--family", "cuda-sm_90"],
        ["tune", "--worker", "--device", "cpu", "--no-confirm"],
    ]
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    assert f"{FAMILY}: 1 jobs queued" in printed
    assert "0 jobs queued" in printed
    assert "1 wait already" in printed
    assert "cuda-sm_90: 1 jobs queued" in printed
    assert "1 of 1 jobs done; none waits" in printed
    assert table.counts(store)["queued"] == 1


@pytest.mark.parametrize(
    "options",
    [["--enqueue", "--worker"], ["--family", "cpu-x"], ["--stay"], ["--enqueue", "--stay"]],
)
def test_options_that_say_nothing_together_are_refused(options):
    with pytest.raises(SystemExit) as ended:
        main(["tune", *options])
    assert ended.value.code == 2
