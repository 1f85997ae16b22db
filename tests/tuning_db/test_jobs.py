"""Runs that are continued and fenced, and jobs that workers take by leases; on either database."""

import subprocess
import sys
import threading
import time

import pytest
import sqlalchemy

from portattn.errors import TuningError
from portattn.tuning_db import jobs, runs, schema
from portattn.tuning_db.key import bucket
from portattn.tuning_db.store import LostRunError, Store
from tests.tuning_db.conftest import tried


@pytest.fixture
def store(either):
    return Store(either)


@pytest.fixture
def begin(store):
    def begin_run(work="the work", store=store, **options):
        return store.begin_run(effort="test", seed=0, budget={}, work=work, **options)

    return begin_run


def as_if_dead(store, run_id):
    """Its process is gone: its number belongs to one that began at another time."""
    with store.transaction() as connection:
        host = runs._me()["host"].rpartition("/")[0] + "/1"
        connection.execute(schema.run.update().where(schema.run.c.id == run_id).values(host=host))


def test_a_run_is_continued_once_its_process_is_gone(store, begin, subject):
    first = begin()
    assert store.add(first, subject, tried(1)) == 1
    assert begin() != first  # its process, this one, is alive
    assert begin("other work") != first
    store.finish_run(begin(resume=False), "done")
    as_if_dead(store, first)
    assert store.measured(first, subject) == [tried(1)]
    with store.transaction() as connection:  # newer runs with the same work end first
        done = schema.run.update().where(schema.run.c.id != first).values(state="done")
        connection.execute(done)
    assert begin() == first
    store.add(first, subject, tried(2))
    assert store.measured(first, subject) == [tried(1), tried(2)]
    with pytest.raises(TuningError, match=r"(?i)unique"):
        store.add(first, subject, tried(2))
    store.finish_run(first, "partial")
    assert begin() == first  # with time left
    store.finish_run(first, "done")
    assert begin() != first


def test_a_process_on_another_machine_is_dead_after_a_while(store, begin):
    first = begin()
    change = schema.run.update().where(schema.run.c.id == first)
    with store.transaction() as connection:
        connection.execute(change.values(host="elsewhere/5"))
    assert begin() != first
    with store.transaction() as connection:
        connection.execute(change.values(heartbeat_us=time.time_ns() // 1000 - runs.DEAD_US))
        connection.execute(
            schema.run.update().where(schema.run.c.id != first).values(state="done")
        )
    assert begin() == first


def test_whoever_lost_its_run_stores_nothing_more(store, either, begin, subject, make_result):
    run_id = begin()
    as_if_dead(store, run_id)
    other = Store(either)
    assert begin(store=other) == run_id
    with pytest.raises(LostRunError, match=r"taken over by another process"):
        store.add(run_id, subject, tried(1))
    with pytest.raises(LostRunError):
        store.record(run_id, make_result())
    with pytest.raises(LostRunError):
        store.finish_run(run_id, "done")
    assert store.measured(run_id, subject) == []
    other.add(run_id, subject, tried(1))


def test_only_what_the_run_measured_of_the_same_thing_is_taken_over(
    store, begin, subject, vary, make_result
):
    run_id = begin()
    store.add(run_id, subject, tried(1))
    for other in (
        vary(subject, policy="graph_cold"),
        vary(subject, shape={"seqlen_q": 7}),
        vary(subject, source_sha256="c" * 64),
        vary(subject, kernel_name="other"),
        vary(subject, device=vary(subject.device, threads=1)),
    ):
        assert store.measured(run_id, other) == []
        store.add(run_id, other, tried(1))
    assert store.measured(run_id, subject) == [tried(1)]
    where = (subject.key, subject.shape, subject.policy)
    assert not store.decided(run_id, *where)
    store.record(run_id, make_result())
    assert store.decided(run_id, *where)
    assert store.measured(run_id, subject)[1:] == [
        # Errors that are not finite are stored as not known.
        *(
            vary(one, max_abs_err=None, error=one.error[:2048]) if one.status != "ok" else one
            for one in make_result().kernels[0].measurements[:2]
        )
    ]


def test_damaged_measurements_are_not_taken_over(store, begin, subject):
    run_id = begin()
    for number in range(4):
        store.add(run_id, subject, tried(number))
    changes = {1: "median_ns = -5", 2: "status = 'fine'", 3: "n = NULL"}
    with store.transaction() as connection:
        for number, change in changes.items():
            text = f"UPDATE measurement SET {change} WHERE id = {number + 1}"
            connection.exec_driver_sql(text)
    assert store.measured(run_id, subject) == [tried(0)]


CASE = {"problem": {"batch": 1}, "mask": None}


def enqueue(store, problem, family="cpu-x", **options):
    return jobs.enqueue(store, family, bucket(problem), CASE, **options)


def test_jobs_go_by_priority_then_age_each_to_one_worker(store, problem, vary):
    for length in (1, 2, 4, 8):
        other = vary(problem, seqlen_q=length)
        assert enqueue(store, other, priority=int(length == 4), options={"most": length})
    assert not enqueue(store, problem=vary(problem, seqlen_q=1))  # waits already
    assert enqueue(store, problem, family="cpu-other")
    taken = [jobs.take(store, ["cpu-x"], "me") for _ in range(5)]
    assert [one.options_json for one in taken[:4]] == [
        f'{{"most":{number}}}' for number in (4, 1, 2, 8)
    ]
    assert taken[4] is None
    assert jobs.counts(store) == {"queued": 1, "leased": 4, "done": 0, "failed": 0}
    jobs.finish(store, taken[0], "done")
    jobs.finish(store, taken[1], "failed", "no \0 good")
    jobs.finish(store, taken[2], "queued")
    assert jobs.counts(store) == {"queued": 2, "leased": 1, "done": 1, "failed": 1}
    again = jobs.take(store, ["cpu-x"], "me")
    assert (again.job_id, again.fence, again.attempts) == (taken[2].job_id, 2, 1)
    assert enqueue(store, vary(problem, seqlen_q=1))  # failed: once more
    assert not enqueue(store, vary(problem, seqlen_q=8))  # being done
    with pytest.raises(TuningError, match="mask data"):
        jobs.enqueue(store, "cpu-x", bucket(problem), {"mask": "x" * (1 << 20)})


def test_a_lease_that_ran_out_goes_to_another_and_the_first_is_refused(
    store, either, begin, problem, subject
):
    enqueue(store, problem)
    lease = jobs.take(store, ["cpu-x"], "first", seconds=0.2)
    run_id = begin(lease=lease)
    store.add(run_id, subject, tried(1))
    assert jobs.take(store, ["cpu-x"], "second") is None
    for _ in range(3):
        time.sleep(0.1)
        jobs.renew(store, lease, seconds=0.2)
    assert jobs.take(store, ["cpu-x"], "second") is None
    time.sleep(0.25)
    other = Store(either)
    second = jobs.take(other, ["cpu-x"], "second")
    assert (second.fence, second.attempts) == (2, 2)
    # From here on, before the second has done anything, the first can change nothing.
    with pytest.raises(LostRunError):
        store.add(run_id, subject, tried(2))
    for refused in (
        lambda: jobs.renew(store, lease),
        lambda: jobs.finish(store, lease, "done"),
        lambda: begin(lease=lease),
    ):
        with pytest.raises(jobs.LostLeaseError, match="another worker has it"):
            refused()
    assert begin(store=other, lease=second) == run_id
    assert other.measured(run_id, subject) == [tried(1)]
    other.add(run_id, subject, tried(2))
    jobs.finish(other, second, "done")


def test_a_job_that_kills_its_workers_is_given_up(store, problem):
    enqueue(store, problem)
    for _ in range(jobs.MAX_ATTEMPTS):
        assert jobs.take(store, ["cpu-x"], "me", seconds=0) is not None
        time.sleep(0.002)
    assert jobs.take(store, ["cpu-x"], "me") is None
    with store.transaction() as connection:
        job = connection.execute(sqlalchemy.select(schema.job)).mappings().one()
    assert (job["state"], "given up" in job["error_text"]) == ("failed", True)


def test_many_workers_at_once_share_without_overlap(either, problem, vary):
    store = Store(either)
    for length in range(20):
        enqueue(store, vary(problem, seqlen_q=1 << length))
    taken, errors = [], []

    def drain():
        try:
            mine = Store(either)
            while (lease := jobs.take(mine, ["cpu-x"], "me")) is not None:
                taken.append(lease.job_id)
                jobs.finish(mine, lease, "done")
        except TuningError as error:
            errors.append(error)

    threads = [threading.Thread(target=drain) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(taken) == sorted(set(taken))
    assert len(taken) == 20


def test_a_process_that_runs_is_alive_and_one_that_ended_is_not():
    code = "import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code])
    host = runs._me()["host"].rpartition("/")[0]
    mine = f"{host}/{runs._pid_started(process.pid)}"
    assert runs.is_alive(mine, process.pid, 0)
    process.kill()
    while runs._pid_started(process.pid):
        time.sleep(0.01)
    assert not runs.is_alive(mine, process.pid, time.time_ns() // 1000)  # though not waited for
    process.wait()
