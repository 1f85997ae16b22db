"""Every way in which a database can be unusable: one warning, no answer, no exception."""

import random
import sqlite3
import time
import warnings

import pytest

from portattn.tuning_db import TuningDatabaseWarning, lookup, snapshot

PARAMS = {"block_q": 32, "pack": True}


def quiet_find(problem, device, **options):
    """find() with the warnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = lookup.find("cpu_forward", problem, device, **options)
        lookup.find("cpu_forward", problem, device, **options)  # never warns twice
        lookup.ranking(["cpu_forward"], problem, device)
    assert all(one.category is TuningDatabaseWarning for one in caught)
    return found, [str(one.message) for one in caught]


def damage(database, sql, *values):
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA ignore_check_constraints=ON")
    connection.execute(sql, values)
    connection.commit()
    connection.close()
    lookup.reload()


def test_a_missing_named_database_is_one_warning(database, problem, device):
    found, messages = quiet_find(problem, device)
    assert found is None
    assert len(messages) == 1
    assert "is missing" in messages[0]
    assert "portattn tune" in messages[0]
    assert not database.parent.exists()  # looking makes nothing


def test_never_having_tuned_is_no_reason_to_warn(monkeypatch, problem, device, tmp_path):
    monkeypatch.setenv("PORTATTN_DB", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    lookup.reload()
    assert quiet_find(problem, device) == (None, [])
    assert lookup.status().state == "missing"
    monkeypatch.undo()
    lookup.reload()


def test_a_locked_database_is_one_warning_soon(fill, make_result, database, problem, device):
    fill(make_result(PARAMS))
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("UPDATE best SET rev = rev + 1")
    started = time.monotonic()
    found, messages = quiet_find(problem, device)
    holder.close()
    assert found is None
    assert len(messages) == 1
    assert "is locked" in messages[0]
    assert time.monotonic() - started < 5


def test_a_writer_does_not_hinder_reading(fill, make_result, database, problem, device):
    fill(make_result(PARAMS))
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("UPDATE best SET median_ns = 1")
    assert quiet_find(problem, device) == ((PARAMS, "exact"), [])
    holder.close()


def test_a_newer_database_is_one_warning(fill, make_result, database, problem, device):
    fill(make_result(PARAMS))
    damage(database, "UPDATE portattn_version SET version_num = '9999'")
    found, messages = quiet_find(problem, device)
    assert found is None
    assert len(messages) == 1
    assert "is newer" in messages[0]
    assert "upgrade portattn" in messages[0]


@pytest.mark.parametrize(
    "message", ["unable to open database file", "attempt to write a readonly database"]
)
def test_a_read_only_folder_still_answers(
    message, fill, make_result, database, problem, device, monkeypatch
):
    """SQLite refuses a WAL database there with one of these.

    Root, who may run tests, is never refused.
    """
    fill(make_result(PARAMS))
    connect = sqlite3.connect

    class Refusing:
        def execute(self, sql):
            raise sqlite3.OperationalError(message)

        def close(self):
            pass

    def connect_as_read_only(uri, /, **options):
        return connect(uri, **options) if "immutable=1" in uri else Refusing()

    assert not database.with_name(database.name + "-wal").exists()
    monkeypatch.setattr(snapshot.sqlite3, "connect", connect_as_read_only)
    found, messages = quiet_find(problem, device)
    assert messages == []
    assert found == (PARAMS, "exact")


def test_a_database_without_our_tables_is_one_warning(database, problem, device):
    database.parent.mkdir()
    sqlite3.connect(database).execute("CREATE TABLE x(y)")
    found, messages = quiet_find(problem, device)
    assert found is None
    assert len(messages) == 1


@pytest.mark.parametrize("content", [b"", b"hello", b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_file_that_is_no_database_is_one_warning(content, database, problem, device):
    database.parent.mkdir()
    database.write_bytes(content)
    found, messages = quiet_find(problem, device)
    assert found is None
    assert len(messages) == 1
    assert "portattn doctor" in messages[0]


def test_attention_is_right_whatever_the_database(database):
    """Through the public call: a damaged file costs one warning and nothing else."""
    import torch

    import portattn
    from portattn import call

    database.parent.mkdir()
    database.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    call.clear_cache()
    q, k, v = (torch.randn(1, 2, 60, 32) for _ in range(3))
    with pytest.warns(TuningDatabaseWarning, match="is unreadable"):
        output = portattn.attention(q, k, v, is_causal=True)
    right = portattn.attention(q, k, v, is_causal=True, backend="reference")
    assert (output - right).abs().max() < 1e-5
    assert portattn.explain(q, k, v, is_causal=True).rung == "default"
    call.clear_cache()


def test_noise_in_the_file_never_raises(
    fill, make_result, database, problem, device, tmp_path, monkeypatch
):
    fill(make_result(PARAMS))
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    whole = database.read_bytes()
    generator = random.Random(1)
    for number in range(150):
        noisy = bytearray(whole)
        for _ in range(generator.choice([1, 20, 2000])):
            noisy[generator.randrange(len(noisy))] = generator.randrange(256)
        path = tmp_path / f"noisy{number}.db"
        path.write_bytes(noisy[: generator.choice([len(noisy), generator.randrange(len(noisy))])])
        monkeypatch.setenv("PORTATTN_DB", str(path))
        lookup.reload()
        found, messages = quiet_find(problem, device)
        assert len(messages) <= 1
        assert found is None or found.rung in lookup.RUNGS


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE config SET params_json = 'import os'",
        "UPDATE config SET params_json = '[1]'",
        "UPDATE config SET params_json = '{\"block_q\": 1.5}'",
        "UPDATE config SET params_json = '{\"block_q\": [1]}'",
        "UPDATE config SET params_json = '{\"block_q\": 99999999999999999999999}'",
        "UPDATE config SET params_json = " + "replace(hex(zeroblob(20000)), '0', '[')",
        "UPDATE config SET params_json = x'ff00'",
        "UPDATE best SET median_ns = 'fast'",
        "UPDATE best SET median_ns = -1",
        "UPDATE best SET default_ns = 1e300",
        "UPDATE problem SET causal = 7",
        "UPDATE problem SET sq_bucket = 'many'",
        "UPDATE device SET family = 3.5e0 || x'00'",
    ],
)
def test_a_poisoned_row_is_skipped_with_one_warning(
    sql, fill, make_result, database, problem, device
):
    fill(make_result(PARAMS))
    damage(database, sql)
    found, messages = quiet_find(problem, device)
    assert found is None
    assert len(messages) <= 1


def test_a_row_that_is_too_long_is_not_even_read(fill, make_result, database, problem, device):
    fill(make_result(PARAMS))
    damage(database, "UPDATE config SET params_json = hex(zeroblob(30000000))")
    assert quiet_find(problem, device) == (None, [])


def test_a_view_that_never_ends_is_stopped(
    fill, make_result, database, problem, device, monkeypatch
):
    fill(make_result(PARAMS))
    monkeypatch.setattr(snapshot, "READ_SECONDS", 0.2)
    endless = (
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
        "SELECT x AS version_num FROM c WHERE x < 0"
    )
    damage(database, "DROP TABLE portattn_version")
    damage(database, f"CREATE VIEW portattn_version AS {endless}")
    started = time.monotonic()
    found, messages = quiet_find(problem, device)
    assert found is None
    assert len(messages) == 1
    assert time.monotonic() - started < 5


def test_data_is_never_code(repository):
    for path in (repository / "tuning_db").rglob("*.py"):
        text = path.read_text()
        for word in ("pickle", "eval(", "exec(", "import_module", "__import__", "yaml"):
            assert word not in text, f"{path}: {word}"
