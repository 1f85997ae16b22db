"""CONTRIBUTING.md's table of environment variables names what the code reads, no more or less."""

import re

FOLDERS = ("portattn", "backends", "tuner", "export", "tuning_db")


def read_by_the_code(repository) -> set[str]:
    """Variables named in quotes in Python, C++ and CUDA files."""
    found = set()
    for folder in FOLDERS:
        for path in (repository / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".hpp", ".h", ".cu", ".cuh"} and path.is_file():
                found |= set(re.findall(r"[\"'](PORTATTN_[A-Z0-9_]+)[\"']", path.read_text()))
    return found


def test_table_is_complete(repository):
    text = (repository / "CONTRIBUTING.md").read_text()
    in_table = set(re.findall(r"^\| `(PORTATTN_[A-Z0-9_]+)`", text, re.MULTILINE))
    assert in_table == read_by_the_code(repository)
