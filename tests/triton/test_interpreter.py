"""Starts the interpreter's tests in a process of their own; their conftest.py says why."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_forward_in_the_interpreter(repository):
    folder = Path(__file__).parent / "interpreter"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(folder), "-q", "-p", "no:cacheprovider"],
        cwd=repository,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout
