"""The training example: a few steps, with a small model."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train_bytes.py"
SMALL = "--steps 20 --seqlen 192 --batch 1 --width 32 --heads 2 --layers 1 --window 40 --first 4"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_bytes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their own module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "train_bytes", module)
        spec.loader.exec_module(module)
        yield module


def test_curves_lie_on_each_other(example, tmp_path):
    results = example.main([*SMALL.split(), "--out", str(tmp_path / "curve")])
    report = json.loads((tmp_path / "curve.json").read_text())
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert report["results"] == results
    ours, theirs = (result["loss"] for result in results.values())
    assert sum(ours[-3:]) < sum(ours[:3])
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_committed_curves_do_too(example):
    path = SCRIPT.parents[1] / "benchmarks" / "results" / "train_bytes.json"
    report = json.loads(path.read_text())
    curves = [result["loss"] for result in report["results"].values()]
    assert len(curves[0]) >= 200
    early, late = example.difference(curves)
    assert early < 1e-3
    assert late < 0.02
