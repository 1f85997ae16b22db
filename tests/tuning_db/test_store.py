"""Writing: migrations, append-only evidence, the best row, several processes at once."""

import os
import sqlite3
import subprocess
import sys

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from portattn.errors import TuningError
from portattn.tuning_db import lookup, schema
from portattn.tuning_db.key import bucket
from portattn.tuning_db.store import Store


def rows(store, table):
    with store.transaction() as connection:
        return [dict(row) for row in connection.execute(sqlalchemy.select(table)).mappings()]


def test_migrations_make_exactly_the_schema(store):
    with store.transaction() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": schema.VERSION_TABLE, "compare_type": True}
        )
        assert compare_metadata(context, schema.metadata) == []
        assert sqlalchemy.inspect(connection).has_table("portattn_version")
        assert not sqlalchemy.inspect(connection).has_table("alembic_version")


def test_the_first_migration_can_be_undone(store):
    import alembic.command
    import alembic.config

    from portattn.tuning_db import engine

    config = alembic.config.Config()
    config.set_main_option("script_location", str(engine._MIGRATIONS))
    with store.transaction() as connection:
        config.attributes["connection"] = connection
        alembic.command.downgrade(config, "base")
        assert sqlalchemy.inspect(connection).get_table_names() == ["portattn_version"]
    Store()  # and made again


def test_the_file_is_in_wal_mode_with_bounds(store, database):
    with store.transaction() as connection:
        pragma = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in (
                "journal_mode",
                "busy_timeout",
                "synchronous",
                "foreign_keys",
                "trusted_schema",
            )
        }
    assert pragma == {
        "journal_mode": "wal",
        "busy_timeout": 30000,
        "synchronous": 2,
        "foreign_keys": 1,
        "trusted_schema": 0,
    }


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
    assert rows(store, schema.config)[2]["params_json"] == '{"block_q":32,"pack":true}'
    assert rows(store, schema.device)[0]["isa_json"] == '["avx2","fma"]'


def test_a_failing_record_stores_nothing(store, make_result, vary):
    broken = make_result()
    kernel = broken.kernels[0]
    broken = vary(
        broken,
        kernels=(kernel, vary(kernel, kernel_name="other", measurements=(kernel.best,) * 2)),
    )
    run_id = store.begin_run(effort="test", seed=0, budget={})
    with pytest.raises(TuningError, match="UNIQUE"):
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


def test_four_processes_write_at_once_and_nothing_is_lost(database, repository):
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
    store = Store()
    assert len(rows(store, schema.measurement)) == 120
    medians = [row["median_ns"] for row in rows(store, schema.measurement) if row["round"] == 1]
    assert [row["median_ns"] for row in rows(store, schema.best)] == [min(medians)]
    assert len(rows(store, schema.device)) == len(rows(store, schema.problem)) == 1
    connection = sqlite3.connect(database)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_killed_writer_loses_nothing_acknowledged(database, repository):
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
    store = Store()
    assert len(rows(store, schema.measurement)) >= 3 * len(acknowledged)
    assert len(rows(store, schema.measurement)) % 3 == 0
    assert lookup.status().state == "ok"


def test_a_locked_database_is_an_error_for_the_tuner_after_a_bounded_wait(store, database):
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TuningError, match="locked"):
        Store(busy_seconds=0.1)
    holder.close()


def test_newer_off_and_network_databases_are_refused(store, database, monkeypatch):
    from portattn.tuning_db import engine

    with store.transaction() as connection:
        connection.exec_driver_sql("UPDATE portattn_version SET version_num = '9999'")
    with pytest.raises(TuningError, match=r"schema 9999, newer.*Upgrade portattn"):
        Store()
    with pytest.raises(TuningError, match="'none'"):
        Store("none")
    monkeypatch.setattr(engine, "network_file_system", lambda path: "nfs4")
    with pytest.raises(TuningError, match=r"network file system \(nfs4\)"):
        Store()


@pytest.mark.parametrize("url", ["nonsense://host/db", "postgresql+nodriver://host/db"])
def test_an_unknown_url_is_an_error(url):
    with pytest.raises(TuningError, match="cannot be used"):
        Store(url)


def test_a_file_that_is_no_database_is_an_error(database):
    database.parent.mkdir()
    database.write_text("hello")
    with pytest.raises(TuningError, match="not a database"):
        Store()
