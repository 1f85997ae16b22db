"""What has no tuned config is counted, stored off the call path, and read back."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest

from portattn.tuning_db import lookup, missed, misses
from portattn.tuning_db.location import locate
from portattn.tuning_db.store import Store

PARAMS = {"block_q": 32, "pack": True}


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    """Misses are counted, and written when the test says so."""
    monkeypatch.setenv("PORTATTN_MISSES", "")
    monkeypatch.setattr(misses, "_start", lambda: None)
    misses._pending.clear()
    yield
    misses._pending.clear()


def table(database):
    with contextlib.closing(sqlite3.connect(database)) as connection:
        names = "count, served_from, problem_json, first_us, last_us"
        return connection.execute(f"SELECT {names} FROM miss ORDER BY count DESC").fetchall()


def test_only_what_was_not_tuned_here_is_counted(
    fill, make_result, database, problem, device, vary
):
    fill(make_result(PARAMS))
    assert lookup.find("cpu_forward", problem, device).rung == "exact"
    assert misses._pending == []
    far = vary(problem, seqlen_q=1 << 16, seqlen_k=1 << 16)
    for length in (1 << 16, (1 << 16) - 5, 1 << 16):  # the last is known to the process already
        lookup.find("cpu_forward", vary(far, seqlen_k=length), device)
    lookup.find("cpu_forward", vary(problem, seqlen_k=2048), device)
    lookup.find("cpu_forward", problem, vary(device, threads=64))
    rungs = [one.rung for one in misses._pending]
    assert rungs == ["default", "default", "nearest", "family"]
    assert table(database) == []
    assert misses.flush() == 4
    assert misses._pending == []
    rows = table(database)
    assert [(row[0], row[1]) for row in rows] == [(2, "default"), (1, "nearest"), (1, "family")]
    assert json.loads(rows[0][2])["seqlen_k"] == (1 << 16) - 5
    lookup.reload()
    lookup.find("cpu_forward", far, device)
    misses.flush()
    count, _, _, first_us, last_us = table(database)[0]
    assert count == 3
    assert first_us < last_us


def test_missed_is_what_nobody_tuned_since(fill, make_result, problem, device, vary, store):
    other = vary(problem, num_heads=2, num_kv_heads=2, head_dim=32)
    fill(make_result(PARAMS))
    for length in (512, 500, 490):
        lookup.find("cpu_forward", vary(other, seqlen_q=length, seqlen_k=length), device)
    lookup.find("cpu_forward", vary(other, num_heads=4), device)
    lookup.find("cpu_forward", other, vary(device, threads=64))
    misses.flush()
    found = missed.missed(store, device.fingerprint)
    assert [(one.count, one.served_from) for one in found] == [(3, "default"), (1, "default")]
    assert len(missed.missed(store, device.fingerprint, min_count=2)) == 1
    assert len(missed.missed(store, device.fingerprint, most=1)) == 1
    assert len(missed.missed(store, device.family)) == 3
    fill(make_result(PARAMS, problem=vary(other, seqlen_q=512, seqlen_k=512)))
    left = missed.missed(store, device.fingerprint)
    assert [one.count for one in left] == [1]
    assert missed.forget(store, device.fingerprint, [left[0].key_sha256, "f" * 64]) == 1
    assert missed.missed(store, device.fingerprint) == []
    assert len(missed.missed(store, device.family)) == 1


def test_nothing_is_made_or_raised(tmp_path, problem, device, database, store, vary):
    gone, junk = tmp_path / "gone.db", tmp_path / "junk.db"
    junk.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    for path in (gone, junk):
        misses.note(locate(path), problem, device, "default")
    newer = sqlite3.connect(database)
    newer.execute("UPDATE portattn_version SET version_num = '9999'")
    newer.commit()
    misses.note(locate(database), problem, device, "default")
    before = junk.read_bytes()
    assert misses.flush(busy_seconds=0.1) == 0
    assert not gone.exists()
    assert junk.read_bytes() == before
    assert newer.execute("SELECT count(*) FROM miss").fetchone() == (0,)
    newer.execute("UPDATE portattn_version SET version_num = '0002'")
    newer.commit()
    newer.execute("BEGIN EXCLUSIVE")
    misses.note(locate(database), problem, device, "default")
    started = time.monotonic()
    assert misses.flush(busy_seconds=0.1) == 0
    assert time.monotonic() - started < 3
    newer.close()
    deep = vary(problem, program=tuple(range(40_000)))
    assert misses.rows_of([misses.Miss(locate(database), deep, device, "default", 1)]) == []


def test_the_list_and_the_table_are_bounded(database, store, problem, device, vary, monkeypatch):
    monkeypatch.setattr(misses, "MAX_PENDING", 3)
    for length in range(1, 9):
        misses.note(locate(database), vary(problem, seqlen_k=1 << length), device, "default")
    assert misses.flush() == 3
    sql = misses._TRIM_SQL.replace(str(misses.MAX_STORED - 1), "1")
    monkeypatch.setattr(misses, "_TRIM_SQL", sql)
    misses.note(locate(database), vary(problem, head_dim=8), device, "default")
    misses.flush()
    assert len(table(database)) == 2


def test_who_counts(monkeypatch, tmp_path):
    file, server = locate(tmp_path / "a.db"), locate("postgresql+psycopg://nobody@nowhere/x")
    http = locate("http://localhost:1")
    assert [misses.are_wanted(one) for one in (file, server, http)] == [True, False, False]
    monkeypatch.setenv("PORTATTN_MISSES", "on")
    assert [misses.are_wanted(one) for one in (file, server, http)] == [True, True, False]
    monkeypatch.setenv("PORTATTN_MISSES", "off")
    assert not any(misses.are_wanted(one) for one in (file, server, http))
    assert not misses.are_wanted(locate("none"))


def test_a_server_takes_them_too(postgresql, problem, device, monkeypatch):
    monkeypatch.setenv("PORTATTN_MISSES", "on")
    url = postgresql.database()
    store = Store(url)
    for _ in range(2):
        misses.note(locate(url), problem, device, "nearest")
        assert misses.flush() == 1
    assert [one.count for one in missed.missed(store, device.fingerprint)] == [2]
    store.engine.dispose()


def test_a_process_stores_them_at_its_end_and_a_fork_not_twice(database, store):
    code = """
import os, torch, portattn
q = torch.randn(1, 2, 40, 16)
portattn.attention(q, q, q, is_causal=True)
pid = os.fork()
if pid == 0:
    import sys
    sys.exit(0)
os.waitpid(pid, 0)
portattn.attention(q, q, q, is_causal=True)
"""
    environment = {**os.environ, "PORTATTN_DB": str(database), "PORTATTN_MISSES": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    assert [row[0] for row in table(database)] == [1]


def test_the_thread_writes_while_the_process_goes_on(
    database, store, problem, device, monkeypatch
):
    monkeypatch.undo()
    monkeypatch.setattr(misses, "FLUSH_SECONDS", 0.05)
    monkeypatch.setattr(misses, "_thread", None)
    misses.note(locate(database), problem, device, "default")
    deadline = time.monotonic() + 10
    while not table(database) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [row[0] for row in table(database)] == [1]
    assert misses._thread is None
