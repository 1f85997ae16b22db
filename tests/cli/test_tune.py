"""`portattn tune --dry-run`, its presets, and `portattn bench-search`."""

import json

import pytest

from portattn import cli

ONE = {
    "kernel": "k", "backend": "b", "problem": "p",
    "values": {"x": list(range(1, 9)), "y": [False, True]}, "default": "00",
    "rows": {f"{x}{y}": 100 + 10 * abs(x - 4) + 3 * y for x in range(8) for y in (0, 1)},
}  # fmt: skip
FILE = {"format": "portattn-oracle", "version": 1, "device": "a device", "tables": [ONE]}


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code or 0, capsys.readouterr()


def test_a_dry_run_counts_and_runs_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PORTATTN_DB", str(tmp_path / "none.db"))
    monkeypatch.setenv("COLUMNS", "150")
    code, said = run(
        capsys, "tune", "--dry-run", "--device", "cpu", "--most", "7",
        "--problem", "h2 s100000 d64 causal",
    )  # fmt: skip
    assert code == 0
    assert "nothing is run" in said.out
    assert "cpu_forward" in said.out
    assert "about" in said.out
    assert not list(tmp_path.iterdir())


def test_an_unknown_preset_names_the_known_ones(capsys):
    code, said = run(capsys, "tune", "--preset", "backward", "--device", "cpu")
    assert code == 1
    assert "forward, sparse, documents, decode" in said.err


def test_searches_are_compared_on_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    file, copy = tmp_path / "times.json", tmp_path / "copy.json"
    file.write_text(json.dumps(FILE))
    code, said = run(
        capsys, "bench-search", str(file), "--seeds", "2", "--evaluations", "16",
        "--strategy", "random", "--noise", "0", "--record", str(copy),
    )  # fmt: skip
    assert code == 0
    assert "a device: 1 tables" in said.out
    assert "100.0 %" in said.out  # all 16 configs were seen
    assert json.loads(copy.read_text())["tables"][0]["default"] == "00"
    code, said = run(capsys, "bench-search", str(file), "--strategy", "luck")
    assert code == 1
    assert "portattn, random, tpe" in said.err
    code, said = run(capsys, "bench-search", str(tmp_path / "absent"))
    assert code == 1
    assert "cannot be read" in said.err
