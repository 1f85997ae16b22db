"""``portattn bench`` on the CPU."""

import json

import pytest

from portattn.bench import session
from tests.cli.test_cli import run

PROBLEM = "h2 s128 d32 float32 causal"


def bench(*arguments, problem=PROBLEM, peer="sdpa"):
    return run("bench", "--problem", problem, "--peer", peer, "--seconds", "0.001",
               "--device", "cpu", *arguments)  # fmt: skip


def test_table_json_and_picture(tmp_path):
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    code, output = bench("--out", str(out), "--plot", str(picture))
    assert code == 0
    assert "problem: b1 h2 s128 d32 float32 causal" in output
    assert "cpu_forward" in output
    assert "cpu_decode: refused: " in output
    document = json.loads(out.read_text())
    assert (document["benchmark"], document["schema"]) == ("bench", 1)
    (row,) = document["rows"]
    assert set(row["contenders"]) == {"cpu_forward", "sdpa"}
    assert row["workload"]["pattern"] == "causal"
    limits = document["runs"][row["run"]]["limits"]
    assert limits["matmul_tflops"] > 0
    assert limits["read_tbps"] > 0
    assert document["runs"][0]["versions"]["torch"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_resume_and_append(tmp_path):
    out = tmp_path / "bench.json"
    bench("--out", str(out))
    code, output = bench("--out", str(out), "--resume")
    assert (code, "0 rows" in output) == (0, True)
    bench("--out", str(out), "--append", "--problem", "h1 s64 d32 float32")
    document = json.loads(out.read_text())
    assert len(document["runs"]) == 2  # a run without rows leaves nothing
    assert [row["run"] for row in document["rows"]] == [1, 1]


def test_no_budget_is_said(tmp_path):
    out = tmp_path / "bench.json"
    code, output = bench("--budget-s", "0", "--out", str(out))
    assert code == 3
    assert "not measured: problem: b1 h2 s128 d32 float32 causal" in output


def test_a_wrong_kernel_fails_the_command(monkeypatch):
    why = {"cpu_forward": "wrong result: error 1", "cpu_decode": "refused: no", "sdpa": "Error: x"}
    monkeypatch.setattr(session, "_measure", lambda *arguments: {"contenders": {}, "not_run": why})
    code, output = bench()
    assert code == 1
    assert [line for line in output.splitlines() if line.startswith("FAILED")] == [
        "FAILED problem: b1 h2 s128 d32 float32 causal: cpu_forward: wrong result: error 1"
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--preset", "fast"),
        ("--kernel", "nothing"),
        ("--only", "no such row"),
        ("--preset", "host", "--only", "host"),
    ],
)
def test_wrong_usage(arguments):
    assert bench(*arguments)[0] == 2
    assert bench(peer="flash_attn_9")[0] == 2
    assert bench(problem="h2 s128")[0] == 2


def test_only_keeps_rows_that_hold_one_of_the_texts():
    more = ("--problem", "h1 s64 d32 float32", "--problem", "h1 s32 d32 float32")
    _, output = bench("--only", "s128", "--only", "s64", *more, "--limit-s", "30")
    assert "2 rows" in output


def test_results_name_no_folders():
    from portattn.cli.bench import _without_folder

    given = ["--out", "/home/me/x.json", "--plot=/tmp/x.png", "h2 s128 longformer:8:2"]
    kept = ["--out", "x.json", "--plot=x.png", "h2 s128 longformer:8:2"]
    assert [_without_folder(one) for one in given] == kept


def test_no_peers():
    code, output = bench(peer="none")
    assert code == 0
    assert "sdpa" not in output
