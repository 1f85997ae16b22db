"""What `import portattn` loads, seen from a fresh process."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "triton",
    "cupy",
    "optuna",
    "sqlalchemy",
    "alembic",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "transformers",
    "fastapi",
    "uvicorn",
)


def modules_after(statement: str) -> set[str]:
    """Top-level modules in a new interpreter that ran the statement."""
    names = "sorted({name.split('.')[0] for name in sys.modules})"
    code = f"{statement}\nimport json, sys\nprint(json.dumps({names}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def loaded_by_torch() -> set[str]:
    return modules_after("import torch")


@pytest.mark.parametrize(
    "statement",
    [
        "import portattn",
        "import portattn; portattn.attention, portattn.explain, portattn.masks",
        "import portattn.masks",
        "import portattn.plan",
        "import portattn.dispatch",
    ],
)
def test_heavy_packages_stay_unloaded(statement, loaded_by_torch):
    loaded = modules_after(statement)
    assert "portattn" in loaded
    assert sorted((loaded - loaded_by_torch) & set(HEAVY)) == []


def test_only_portattn_is_installed():
    # The root folders are reached through portattn; a top-level `export` would shadow a user's.
    loaded = modules_after("import portattn, portattn.dispatch")
    assert not loaded & {"backends", "tuner", "export", "tuning_db"}
