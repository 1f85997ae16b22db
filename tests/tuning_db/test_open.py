"""Opening: migrations, bounds on waiting, databases that are refused."""

import sqlite3

import alembic.command
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from portattn.errors import TuningError
from portattn.tuning_db import engine, lookup, schema
from portattn.tuning_db.exchange import export_text
from portattn.tuning_db.store import Store


def test_migrations_make_exactly_the_schema(either):
    store = Store(either)
    with store.transaction() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": schema.VERSION_TABLE, "compare_type": True}
        )
        assert compare_metadata(context, schema.metadata) == []
        inspector = sqlalchemy.inspect(connection)
        assert inspector.has_table("portattn_version")
        assert not inspector.has_table("alembic_version")
        for table in schema.metadata.sorted_tables:  # which Alembic does not compare
            wanted = {
                one.name
                for one in table.constraints
                if isinstance(one, sqlalchemy.CheckConstraint) and one.name
            }
            found = {one["name"] for one in inspector.get_check_constraints(table.name)}
            assert found == wanted, table.name


def test_an_older_database_is_migrated_with_all_its_rows(
    either, make_result, problem, device, vary
):
    store = Store(either)
    run_id = store.begin_run(effort="test", seed=0, budget={})
    store.record(run_id, make_result())
    store.record(run_id, make_result(problem=vary(problem, seqlen_k=64)))
    store.finish_run(run_id, "done")
    text = export_text(store)
    with engine.migrating(store.engine) as connection:
        alembic.command.downgrade(engine.migration_config(connection), "0001")
    lookup.reload()
    assert lookup.find("cpu_forward", problem, device).rung == "exact"  # reading needs no new one
    assert export_text(Store(either)) == text


def test_the_migrations_can_be_undone(either):
    store = Store(either)
    with engine.migrating(store.engine) as connection:
        alembic.command.downgrade(engine.migration_config(connection), "base")
        assert sqlalchemy.inspect(connection).get_table_names() == ["portattn_version"]
    Store(either)  # and made again


def test_the_file_is_in_wal_mode_with_bounds(store):
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


def test_a_locked_database_is_an_error_for_the_tuner_after_a_bounded_wait(store, database):
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TuningError, match="locked"):
        Store(busy_seconds=0.1)
    holder.close()


def test_a_locked_row_on_a_server_is_an_error_after_a_bounded_wait(postgresql):
    url = postgresql.database()
    first, second = Store(url), Store(url, busy_seconds=0.2)
    run_id = first.begin_run(effort="test", seed=0, budget={})
    second._fences = first._fences
    with first.transaction() as connection:
        connection.exec_driver_sql("SELECT * FROM run FOR UPDATE")
        with pytest.raises(TuningError, match="lock timeout"):
            second.finish_run(run_id, "done")
    second.finish_run(run_id, "done")


def test_newer_off_and_network_databases_are_refused(store, monkeypatch):
    with store.transaction() as connection:
        connection.exec_driver_sql("UPDATE portattn_version SET version_num = '9999'")
    with pytest.raises(TuningError, match=r"schema 9999, newer.*Upgrade portattn"):
        Store()
    with pytest.raises(TuningError, match="'none'"):
        Store("none")
    monkeypatch.setattr(engine, "network_file_system", lambda path: "nfs4")
    with pytest.raises(TuningError, match=r"network file system \(nfs4\)"):
        Store()


@pytest.mark.parametrize(
    "url",
    [
        "nonsense://host/db",
        "postgresql+nodriver://host/db",
        "postgresql+psycopg://nobody@/db?host=/nowhere",
    ],
)
def test_a_url_that_leads_nowhere_is_an_error(url):
    with pytest.raises(TuningError, match="cannot be used"):
        Store(url)


def test_a_file_that_is_no_database_is_an_error(database):
    database.parent.mkdir()
    database.write_text("hello")
    with pytest.raises(TuningError, match="not a database"):
        Store()


def test_a_message_that_cannot_be_decoded_is_an_error_like_others(store):
    """The sqlite3 module raises this for a damaged file: its message holds the file's bytes."""
    with pytest.raises(TuningError, match="cannot be used"), store.transaction():
        b"unknown function: leng\xbch()".decode()
