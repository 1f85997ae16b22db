"""The command line: help, documentation, and each command of the tuner and the database."""

import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from portattn import cli
from portattn.device import DeviceKey
from portattn.tuning_db import lookup
from portattn.tuning_db.key import bucket
from portattn.tuning_db.records import KernelResult, Measurement, ProblemResult, Timing
from portattn.tuning_db.store import Store

OPTION = re.compile(r"--[a-z][a-z-]+")


def run(*arguments):
    """Exit code and output of one command, in this process."""
    command = arguments[0] if arguments and arguments[0] in cli.COMMANDS else None
    result = CliRunner().invoke(
        cli.build(command), list(arguments), prog_name="portattn", env={"COLUMNS": "200"}
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def database(tmp_path, monkeypatch):
    path = tmp_path / "tuning.db"
    monkeypatch.setenv("PORTATTN_DB", str(path))
    lookup.reload()
    yield path
    monkeypatch.undo()
    lookup.reload()


@pytest.fixture
def filled(database):
    """A database with one best config."""
    from portattn.tuner import cases

    timing = Timing(1_500_000, 1, 1, 1, 1, 5, 1, 1)
    best = Measurement({"block_q": 32}, 1, "ok", timing, 3_000_000)
    kernel = KernelResult(
        "cpu_forward", "cpu", "native", "a" * 64, "b" * 64, (best,), best, 2, "rule"
    )
    key = bucket(cases.parse("h8 s4096 d64 causal").problem)
    store = Store()
    device = DeviceKey("cpu", "maker", "Some Processor", "x86_64-v3", 4, 4)
    store.record(
        store.begin_run(effort="t", seed=0, budget={}),
        ProblemResult(device, key, {}, "eager_warm", (kernel,)),
    )
    return database


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help(command):
    code, output = run(*([command] if command else []), "--help")
    assert code == 0
    assert "Usage: portattn" in output
    if command is None:
        assert all(name in output for name in cli.COMMANDS)
    else:
        assert len(output.splitlines()) > 5


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_and_option_is_documented(command, repository):
    sections = re.split(r"^## ", (repository / "docs" / "cli.md").read_text(), flags=re.MULTILINE)
    section = next((text for text in sections if text.startswith(f"`portattn {command}`\n")), "")
    assert section, f"docs/cli.md has no section for {command}"
    app = typer.Typer()
    app.command()(cli.load(command))
    options = {
        option for parameter in typer.main.get_command(app).params for option in parameter.opts
    }
    wanted = {option for option in options if option.startswith("--")} - {
        "--help", "--install-completion", "--show-completion",
    }  # fmt: skip
    assert sorted(wanted - set(OPTION.findall(section))) == []
    assert command in (repository / "docs" / "cli.md").read_text()


def test_listing_imports_no_command(repository):
    code = (
        "import sys\nfrom portattn.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted(n for n in sys.modules if n.startswith(('portattn.cli.', 'portattn.tuner', "
        "'optuna', 'sqlalchemy'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_and_wrong_usage():
    import portattn

    assert run("--version") == (0, f"portattn {portattn.__version__}\n")
    assert run("no-such-command")[0] == 2
    assert run("tune", "--no-such-option")[0] == 2


def test_an_error_is_one_line_and_exit_code_1(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        cli.main(
            ["import-db", str(tmp_path / "absent.json"), "--database", str(tmp_path / "x.db")]
        )
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("portattn: file")


def test_tune_then_show_then_doctor(database):
    problem = "b1 h2 s64 d32 float32 causal"
    code, output = run(
        "tune", "--problem", problem, "--budget", "1", "--device", "cpu", "--no-progress"
    )
    assert code == 0, output
    assert "cpu_forward *" in output
    assert f"stored in {database}" in output
    assert "not tuned: triton_forward: " in output
    code, output = run("show", "--problem", "causal")
    assert code == 0
    assert "b1 h2 s64 d32 float32 causal" in output
    assert "cpu_forward" in output
    code, output = run("doctor", "--problem", problem)
    assert code == 0, output
    assert "[exact]" in output
    assert f"{database}: ok" in output


def test_a_budget_too_small_for_all_problems_exits_with_3(database):
    problems = ["--problem", "h1 s32 d16", "--problem", "h2 s32 d16"]
    code, output = run(
        "tune", *problems, "--budget", "0.001", "--device", "cpu", "--kernel", "cpu_forward"
    )
    assert code == 3
    assert "not reached within the budget: b1 h2 s32 d16 float32 dense" in output


def test_problems_come_from_a_file_too(database, tmp_path):
    file = tmp_path / "problems.json"
    file.write_text('["h1 s32 d16"]')
    code, output = run(
        "tune", "--problems", str(file), "--budget", "0.2", "--device", "cpu", "--no-progress"
    )
    assert code == 0, output
    assert "b1 h1 s32 d16 float32 dense" in output


def test_show_filters_and_says_when_there_is_nothing(filled, tmp_path):
    code, output = run("show")
    assert code == 0
    assert "Some Processor" in output
    assert "2.000x" in output
    assert "block_q=32" in output
    assert "0 best configs" in run("show", "--problem", "d128")[1]
    assert "0 best configs" in run("show", "--kernel", "triton")[1]
    code, output = run("show", "--database", str(tmp_path / "none.db"))
    assert code == 0
    assert "run `portattn tune`" in output


def test_export_and_import(filled, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    other = str(tmp_path / "other.db")
    assert run("export-db", str(first))[0] == 0
    code, output = run("import-db", str(first), "--database", other)
    assert code == 0
    assert "1 best" in output
    assert "nothing new" in run("import-db", str(first), "--database", other)[1]
    assert run("export-db", str(second), "--database", other)[0] == 0
    assert first.read_bytes() == second.read_bytes()
    assert run("export-db")[1] == first.read_text()


def test_seeds_are_written_in_their_format(filled):
    from portattn.tuning_db import seeds

    rows = seeds.parse(run("export-db", "--seeds", "cpu-x86_64-v3")[1])
    assert [(row.kernel_name, row.params) for row in rows] == [("cpu_forward", {"block_q": 32})]


def test_exporting_makes_no_database(tmp_path):
    from portattn.errors import TuningError

    path = tmp_path / "absent.db"
    with pytest.raises(TuningError, match="run `portattn tune`"):
        run("export-db", "--database", str(path))
    assert not path.exists()


def test_doctor_fails_on_a_damaged_database(database):
    database.write_text("hello")
    code, output = run("doctor")
    assert code == 1
    assert f"{database}: unreadable" in output
    assert "[default]" in output  # and calls run all the same


def test_doctor_fails_without_the_library(monkeypatch, tmp_path):
    from portattn import native

    monkeypatch.setenv("PORTATTN_LIBRARY", str(tmp_path / "absent.so"))
    native.library.cache_clear()
    try:
        code, output = run("doctor", "--backend", "reference")
    finally:
        native.library.cache_clear()
    assert code == 1
    assert "libportattn cannot be loaded" in output
