"""Writing: append-only evidence, the best row, several processes at once; on either database."""

import os
import subprocess
import sys

import pytest
import sqlalchemy

from portattn.errors import TuningError
from portattn.tuning_db import lookup, schema
from portattn.tuning_db.key import bucket
from portattn.tuning_db.store import Store


@pytest.fixture
def store(either):
    return Store(either)


def rows(store, table):
    query = sqlalchemy.select(table)
    if "id" in table.c:
        query = query.order_by(table.c.id)
    with store.transaction() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def test_a_result_is_stored_whole(store, fill, make_result):
    fill(make_result())
    measured = rows(store, schema.measurement)
    assert [row["status"] for row in measured] == ["ok", "wrong_result", "ok"]
    assert measured[1]["max_abs_err"] is None  # infinite
    assert len(measured[1]["error_text"]) == 2048
    best = rows(store, schema.best)[0]
    assert (best["median_ns"], best["default_ns"], best["gain"], best["rev"]) == (
        1000,
        2000,
        2.0,
        1,
    )
    assert best["measurement_id"] == measured[2]["id"]
    params = {row["id"]: row["params_json"] for row in rows(store, schema.config)}
    assert params[best["config_id"]] == '{"block_q":32,"pack":true}'
    assert rows(store, schema.device)[0]["isa_json"] == '["avx2","fma"]'


def test_text_that_no_database_holds_is_stored_all_the_same(store, subject, make_result, vary):
    """A compiler that crashes prints what it likes."""
    run_id = store.begin_run(effort="test", seed=0, budget={})
    one = vary(make_result().kernels[0].measurements[1], error="\0\ud83d broken \x1b")
    store.add(run_id, subject, one)
    assert "broken" in rows(store, schema.measurement)[0]["error_text"]


def test_a_failing_record_stores_nothing(store, make_result, vary):
    broken = make_result()
    kernel = broken.kernels[0]
    broken = vary(
        broken,
        kernels=(kernel, vary(kernel, kernel_name="other", measurements=(kernel.best,) * 2)),
    )
    run_id = store.begin_run(effort="test", seed=0, budget={})
    with pytest.raises(TuningError, match=r"(?i)unique"):
        store.record(run_id, broken)
    assert rows(store, schema.measurement) == []
    assert rows(store, schema.best) == []


def test_best_is_replaced_by_who_knew_it_else_only_by_a_faster_one(
    store, fill, make_result, device, problem
):
    def best():
        return [(row["median_ns"], row["rev"]) for row in rows(store, schema.best)]

    fill(make_result(median_ns=1000))
    fill(make_result(median_ns=1100))  # measured against nothing: another tuner stored meanwhile
    assert best() == [(1000, 1)]
    fill(make_result(median_ns=900))
    assert best() == [(900, 2)]
    key = bucket(problem)
    kernel = make_result().kernels[0]
    incumbent = store.incumbent(device, key, "cpu_forward", kernel.toolchain_class, "eager_warm")
    assert (incumbent.params, incumbent.rev) == ({"block_q": 32, "pack": True}, 2)
    fill(make_result(median_ns=1200, expected_rev=incumbent.rev))
    assert best() == [(1200, 3)]
    assert len(rows(store, schema.measurement)) == 12


def test_what_is_stored_is_looked_up(fill, make_result, problem, device):
    fill(make_result())
    found = lookup.find("cpu_forward", problem, device)
    assert found == ({"block_q": 32, "pack": True}, "exact")
    assert lookup.status().state == "ok"


def test_one_run_holds_several_shapes_and_policies_of_a_bucket(store, make_result, vary):
    one = make_result()
    run_id = store.begin_run(effort="test", seed=0, budget={})
    store.record(run_id, one)
    store.record(run_id, vary(one, policy="graph_cold"))
    store.record(run_id, vary(one, shape={"seqlen_q": 1000}))
    assert len(rows(store, schema.measurement)) == 9
    assert len(rows(store, schema.best)) == 2
    with pytest.raises(TuningError, match=r"(?i)unique"):
        store.record(run_id, one)


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import result
from portattn.tuning_db.store import Store
store = Store()
number = int(sys.argv[2])
for index in range(10):
    run_id = store.begin_run(effort="test", seed=number, budget={})
    store.record(run_id, result(median_ns=1000 + (index * 7 + number * 3) % 100))
    print("acknowledged", flush=True)
"""


def test_four_processes_write_at_once_and_nothing_is_lost(either, repository):
    folder = str(repository / "tests" / "tuning_db")
    command = [sys.executable, "-c", WRITER, folder]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    writers = [
        subprocess.Popen(
            [*command, str(number)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for number in range(4)
    ]
    output = [writer.communicate(timeout=120)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0, 0]
    assert sum(text.count("acknowledged") for text in output) == 40
    store = Store(either)
    assert len(rows(store, schema.measurement)) == 120
    medians = [row["median_ns"] for row in rows(store, schema.measurement) if row["round"] == 1]
    assert [row["median_ns"] for row in rows(store, schema.best)] == [min(medians)]
    assert len(rows(store, schema.device)) == len(rows(store, schema.problem)) == 1


def test_a_killed_writer_loses_nothing_acknowledged(either, repository):
    folder = str(repository / "tests" / "tuning_db")
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    endless = WRITER.replace("range(10)", "range(10**9)")
    writer = subprocess.Popen(
        [sys.executable, "-c", endless, folder, "0"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    acknowledged = [writer.stdout.readline() for _ in range(5)]
    writer.kill()
    acknowledged += writer.communicate(timeout=60)[0].splitlines()
    store = Store(either)
    assert len(rows(store, schema.measurement)) >= 3 * len(acknowledged)
    assert len(rows(store, schema.measurement)) % 3 == 0
    assert lookup.status().state == "ok"
