"""``portattn verify``."""

import re

import pytest
import typer
from typer.testing import CliRunner

from portattn.cli import verify as module
from portattn.cli.verify import verify
from portattn.conformance import Outcome

app = typer.Typer()
app.command()(verify)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_table():
    result = run(
        "--backend", "reference", "--case", "causal", "--case", "nan_*", "--device", "cpu"
    )
    assert result.exit_code == 0
    assert "reference on cpu" in result.output
    assert "float32" in result.output
    assert "bfloat16" in result.output
    assert "causal" in result.output
    assert "NaN arrives" in result.output
    assert "12 passed, 0 failed, 0 refused with a reason" in result.output


def test_refusals_are_shown_with_their_reason():
    result = run("--backend", "cupy", "--case", "causal", "--dtype", "float16", "--device", "cpu")
    assert result.exit_code == 0
    kernels = re.findall(r"(\w+) on cpu: refused, every case: runs on cuda", result.output)
    assert "cupy_forward_sm80" in kernels
    assert f"0 passed, 0 failed, {len(kernels)} refused with a reason" in result.output


def test_a_failure_is_the_exit_code(monkeypatch):
    def fail(kernel, case, dtype, device):
        status = "fail" if dtype == "float16" else "refused"
        return Outcome(kernel, case.name, dtype, status, detail=f"{status} for a reason")

    monkeypatch.setattr(module, "outcome", fail)
    result = run("--backend", "cpu_forward", "--case", "dense", "--device", "cpu")
    assert result.exit_code == 1
    assert "FAIL cpu_forward dense float16: fail for a reason" in result.output
    assert "refused: [1] refused for a reason" in result.output


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--case", "no_such", "matches none of"),
        ("--dtype", "int8", "is none of float32"),
        ("--backend", "tpu", "backend is"),
    ],
)
def test_unknown_names(option, value, text):
    result = run(option, value)
    assert result.exit_code == 2
    assert text in result.output


def test_gradients():
    result = run(
        "--gradients", "--backend", "cpu", "--case", "causal", "--case", "nan_key",
        "--dtype", "float32", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "cpu_forward on cpu" in result.output
    assert re.search(r"causal \W+ \d\.\de-0\d \(\d\.\de-0\d\)", result.output)
    assert "nan_key" not in result.output
