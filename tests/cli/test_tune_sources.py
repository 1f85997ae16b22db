"""`portattn tune` of what was missed, what is stale, and models; its mirror; `serve` refused."""

import contextlib
import sqlite3
import sys

import optuna
import pytest

from portattn import cli
from portattn.device import device_key
from portattn.tuner import cases
from portattn.tuning_db import misses
from portattn.tuning_db.location import locate
from portattn.tuning_db.store import Store

QUICK = (
    "--device",
    "cpu",
    "--kernel",
    "cpu_forward",
    "--most",
    "2",
    "--no-progress",
    "--no-confirm",
)


@pytest.fixture
def tune(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PORTATTN_DB", str(tmp_path / "tuning.db"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["tune", *QUICK, *arguments])
        said = capsys.readouterr()
        return ended.value.code or 0, said.out + said.err

    return run


def test_missed_then_stale_then_nothing(tune, tmp_path, monkeypatch):
    code, said = tune("--missed")
    assert code == 1
    assert "there is no tuning database" in said
    trials = f"sqlite:///{tmp_path / 'trials.db'}"
    assert tune("--problem", "h2 s64 d16", "--budget", "1", "--optuna-storage", trials)[0] == 0
    (study,) = optuna.get_all_study_summaries(trials)
    assert study.n_trials >= 1
    assert study.study_name.startswith("cpu_forward: b1 h2 s64 d16 float32 dense")
    code, said = tune("--missed", "--stale")
    assert code == 0
    assert "nothing to tune" in said

    monkeypatch.setattr(misses, "_start", lambda: None)
    database = tmp_path / "tuning.db"
    missed = cases.parse("h2 s96 d32 causal").problem
    for _ in range(2):
        misses.note(locate(database), missed, device_key("cpu"), "default")
    assert misses.flush() == 2
    assert "nothing to tune" in tune("--missed", "--min-count", "3")[1]
    code, said = tune("--missed", "--dry-run")
    assert "d32" in said
    code, said = tune("--missed", "--budget", "1")
    assert code == 0
    assert "b1 h2 s128 d32 float32 causal" in said
    assert "s64 d16" not in said
    assert "nothing to tune" in tune("--missed")[1]

    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE kernel SET source_sha256 = ?", ("0" * 64,))
        connection.commit()
    code, said = tune("--stale", "--dry-run")
    assert "s64 d16" in said
    assert "d32" in said


def test_models_are_problems(tune):
    code, said = tune("--model", "bert-base", "--dry-run")
    assert code == 0
    assert "b8 h12 s512 d64" in said
    code, said = tune("--model", "no-such-model", "--dry-run")
    assert code == 1
    assert "bert-base" in said


def test_what_does_not_go_together(tune, tmp_path):
    Store(tmp_path / "tuning.db").engine.dispose()
    code, said = tune("--stale", "--enqueue", "--family", "cuda-sm_90")
    assert code == 1
    assert "--family" in said
    code, said = tune("--missed", "--enqueue", "--family", "cuda-sm_90")
    assert code == 0
    assert "0 jobs" in said


def test_serving_needs_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--database", str(tmp_path / "tuning.db")])
    assert ended.value.code == 1
    assert "pip install 'portattn[serve]'" in capsys.readouterr().err


def test_serving_an_absent_database_or_a_taken_port_is_an_error(tmp_path, capsys):
    for arguments in (["--port", "0"], ["--host", "192.0.2.1"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["serve", "--database", str(tmp_path / "tuning.db"), *arguments])
        assert ended.value.code == 1
        assert "portattn tune" in capsys.readouterr().err
