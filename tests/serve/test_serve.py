"""The endpoint: read only, bounded, revalidated; and what machines without a database load."""

import contextlib
import http.server
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings

import pytest

from portattn.report.reader import Reader
from portattn.serve import app, exchange
from portattn.tuner import cases
from portattn.tuning_db import TuningDatabaseWarning, http_snapshot, lookup, snapshot
from portattn.tuning_db.exchange import export_text, import_text
from portattn.tuning_db.location import locate
from portattn.tuning_db.store import Store
from tests import stored
from tests.serve.server import ask, serving


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return stored.database(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def url(database):
    with serving(database) as address:
        yield address


def content(url, path):
    status, _, body = ask(url + path)
    assert status == 200
    return json.loads(body)


def test_bests_are_in_the_exchange_format(url, database, tmp_path):
    text = ask(url + "/v1/best")[2].decode()
    first, second = Store(tmp_path / "a.db"), Store(tmp_path / "b.db")
    assert import_text(first, text)["best"] == 4
    assert import_text(first, text)["best"] == 0
    import_text(second, export_text(Store(database)))
    ours, whole = (snapshot.read(one.location).rows for one in (first, second))
    assert ours == whole
    assert export_text(first) == text  # nothing but bests was sent
    some = content(url, f"/v1/best?device={stored.GPU.fingerprint}")["tables"]
    assert [row["kernel_name"] for row in some["best"]] == ["cupy_forward_sm90", "triton_forward"]
    assert len(some["device"]) == len(some["problem"]) == 1
    assert some["measurement"] == some["run"] == some["toolchain"] == []
    family = content(url, "/v1/best?family=cpu-x86_64-v4")["tables"]
    assert len(family["best"]) == 2
    assert content(url, f"/v1/best?device={'0' * 64}")["tables"]["best"] == []


def test_a_database_server_is_served_too(postgresql):
    address = postgresql.database()
    store = Store(address)
    stored.fill(store)
    reader = Reader(locate(address))
    bests = exchange.Bests(reader)
    answer = bests.answer()
    assert len(json.loads(answer.body)["tables"]["best"]) == 4
    assert bests.answer() is answer
    store.engine.dispose()
    reader.close()


def test_what_has_not_changed_is_not_sent_again(tmp_path):
    database = stored.database(tmp_path)
    with serving(database) as url:
        status, headers, body = ask(url + "/v1/best")
        etag = headers["ETag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            status, headers, rest = ask(url + "/v1/best", If_None_Match=known)
            assert (status, rest, headers["ETag"]) == (304, b"", etag)
        assert ask(url + "/v1/best", If_None_Match='"other"')[2] == body
        assert ask(url + "/v1/best?family=cpu-x86_64-v4")[1]["ETag"] != etag
        store = Store(database)
        run_id = store.begin_run(effort="test", seed=0, budget={})
        stored.store_search(store, run_id, cases.parse("h2 s64 d16"))
        status, headers, _ = ask(url + "/v1/best", If_None_Match=etag)
        assert status == 200
        assert headers["ETag"] != etag


def test_it_only_reads(url, database):
    before = database.read_bytes()
    for path in ("/", "/v1/best", "/v1/devices", f"/devices/{stored.CPU.fingerprint}"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert ask(url + path, method)[0] == 405
        status, _, body = ask(url + path, "HEAD")
        assert (status, body) == (200, b"")
    assert database.read_bytes() == before


def test_answers_are_bounded_and_guarded(url, monkeypatch):
    status, headers, _ = ask(url + "/")
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ask(url + "/", Host="evil.example")[0] == 421
    assert ask(url + "/", Host="localhost:1")[0] == 200
    monkeypatch.setattr(exchange, "MAX_ROWS", 1)
    status, _, body = ask(url + "/v1/best?family=cuda-sm_90")
    assert status == 400
    assert b"more than 1 rows" in body
    wrong = ("/v1/best?device=x", f"/v1/best?family={'x' * 300}", "/devices/x")
    assert {ask(url + path)[0] for path in wrong} == {422}
    absent = (f"/devices/{'0' * 64}", f"/devices/{stored.CPU.fingerprint}/problems/{'0' * 64}",
              "/static/app.py", "/static/..%2fapp.py", "/docs", "/redoc")  # fmt: skip
    assert {ask(url + path)[0] for path in absent} == {404}


def test_devices_problems_and_courses(url):
    devices = {one["fingerprint"]: one for one in content(url, "/v1/devices")}
    assert devices[stored.GPU.fingerprint]["problems"] == 1
    assert devices[stored.CPU.fingerprint]["measurements"] == 28
    problems = content(url, f"/v1/devices/{stored.GPU.fingerprint}/problems")
    assert [best["kernel"] for best in problems[0]["bests"]] == [
        *("cupy_forward_sm90", "triton_forward"),
    ]
    path = f"/v1/devices/{stored.GPU.fingerprint}/problems/{problems[0]['key_sha256']}/courses"
    courses = content(url, path)
    assert [one["kernel"] for one in courses] == ["cupy_forward_sm90", "triton_forward"]
    assert [one["status"] for one in courses[0]["attempts"]].count("ok") == 11
    assert "/v1/best" in content(url, "/v1/openapi.json")["paths"]


def test_a_database_that_goes_bad_is_no_secret_told(tmp_path):
    database = stored.database(tmp_path)
    with serving(database) as url:
        database.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
        for path in ("/v1/best", "/", "/v1/devices"):
            status, _, body = ask(url + path)
            assert status == 503
            assert str(tmp_path).encode() not in body
    good = stored.database(tmp_path)
    with serving(good) as url:
        with contextlib.closing(sqlite3.connect(good)) as connection:
            connection.execute("PRAGMA foreign_keys=OFF")
            connection.execute("DELETE FROM problem")
            connection.commit()
        assert ask(url + "/v1/best")[0] == 503


def find(address, monkeypatch):
    """A lookup with PORTATTN_DB at an address, and its warnings."""
    monkeypatch.setenv("PORTATTN_DB", address)
    lookup.reload()
    problem = cases.parse(stored.PROBLEMS[0]).problem
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            found = lookup.find("cpu_forward", problem, stored.CPU)
    state = lookup.status().state
    monkeypatch.setenv("PORTATTN_DB", "none")
    lookup.reload()
    assert all(one.category is TuningDatabaseWarning for one in caught)
    return found, state, [str(one.message) for one in caught]


def test_a_machine_without_the_database_finds_the_same(url, database, monkeypatch):
    near = find(str(database), monkeypatch)
    assert near[0].params == {"block_q": 112, "pack": False, "kind": "tiles"}
    for address in (url, url + "/", url + "/?family=cpu-x86_64-v4"):
        assert find(address, monkeypatch) == near
    assert find(url + "/?family=cuda-sm_90", monkeypatch) == (None, "ok", [])
    sent = http_snapshot.request_for("https://me:a%20word@host:1/tuning/?family=x")
    assert sent.full_url == "https://host:1/tuning/v1/best?family=x"
    assert sent.get_header("Authorization") == "Basic bWU6YSB3b3Jk"


class Odd(http.server.BaseHTTPRequestHandler):
    """Answers that no `portattn serve` gives, by the path before /v1/best."""

    def do_GET(self):
        what = self.path.split("/")[1]
        if what == "redirect":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        self.send_response(500 if what == "error" else 200)
        self.end_headers()
        with contextlib.suppress(OSError):
            if what == "slow":
                for _ in range(60):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)
            elif what == "large":
                self.wfile.write(b" " * 4000)
            else:
                self.wfile.write(BODIES.get(what, b"so sorry"))

    def log_message(self, *_):
        """Says nothing."""


EMPTY = {name: [] for name in ("best", "device", "kernel", "config", "problem")}
FINE = {"format": "portattn-tuning", "version": 1, "schema": "0002", "tables": EMPTY}
BODIES = {
    "text": b"<html>", "list": b"[1]", "deep": b"[" * 100_000, "bytes": b"\xff\xfe",
    "newer": json.dumps({**FINE, "version": 9}).encode(),
    "missing": json.dumps({**FINE, "tables": {}}).encode(),
    "dangling": json.dumps({**FINE, "tables": {**EMPTY, "best": [{"config_id": 7}]}}).encode(),
    "empty": json.dumps(FINE).encode(),
}  # fmt: skip


def test_whatever_answers_costs_one_warning(monkeypatch):
    monkeypatch.setattr(http_snapshot, "SECONDS", 0.5)
    monkeypatch.setattr(http_snapshot, "MAX_BYTES", 200_000 - 1)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    states = {}
    for what in (*BODIES, "error", "redirect", "slow"):
        found, states[what], messages = find(f"{address}/{what}", monkeypatch)
        assert found is None
        assert len(messages) == (what != "empty")
    monkeypatch.setattr(http_snapshot, "MAX_BYTES", 100)
    assert find(f"{address}/large", monkeypatch)[1] == "unreadable"
    server.shutdown()
    server.server_close()
    assert states.pop("empty") == "ok"
    assert states.pop("newer") == "newer"
    assert states.pop("slow") == "unreachable"
    assert set(states.values()) == {"unreadable"}
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    found, state, messages = find(f"http://127.0.0.1:{port}", monkeypatch)
    assert (found, state, len(messages)) == (None, "unreachable", 1)
    assert "portattn serve" in messages[0]


def test_who_is_told_loopback():
    assert [app.is_loopback(host) for host in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert not any(app.is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "name"))


def test_the_command_serves_until_it_is_stopped(database, repository):
    command = [sys.executable, "-m", "portattn.cli", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--database", str(database)], stdout=subprocess.PIPE, text=True, cwd=repository
    )
    try:
        line = process.stdout.readline()
        address = line.split()[0]
        assert address.startswith("http://127.0.0.1:")
        assert ask(address + "v1/devices")[0] == 200
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
