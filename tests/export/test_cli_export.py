import sys

import pytest

from portattn import cli

MODULE = """
import torch, portattn
from portattn import masks

class Window(torch.nn.Module):
    def __init__(self, masked=True):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(16))

    def forward(self, query, key, value):
        return portattn.attention(query * self.scale, key, value, masks.sliding_window(8))

window = Window()
number = 3
"""
SIZES = ["--input", "batch=2,4,seqlen=24,16"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "exported_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("exported_module", None)


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", *arguments])
    return stopped.value.code


@pytest.mark.parametrize("name", ["window", "Window"])
def test_exports_and_checks(folder, capsys, name):
    assert run(f"exported_module:{name}", "model.onnx", *SIZES * 3) == 0
    printed = capsys.readouterr().out
    assert "BAND(-7, 0)" in printed
    assert printed.count("agrees with torch") == 4
    assert (folder / "model.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exported_module", "model.onnx", *SIZES], "it must be package.module:name"),
        (["exported_module:absent", "model.onnx", *SIZES], "cannot be imported"),
        (["absent_module:window", "model.onnx", *SIZES], "cannot be imported"),
        (["exported_module:number", "model.onnx", *SIZES], "it must be a torch.nn.Module"),
        (
            ["exported_module:window", "model.onnx", "--input", "2,x"],
            "it must be sizes and a dtype",
        ),
        (
            ["exported_module:window", "model.onnx", "--input", "2:int4"],
            "it must be sizes and a dtype",
        ),
    ],
)
def test_errors_say_what_to_do(folder, capsys, arguments, message):
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err
