"""The file of results: JSON, written whole after every row, so that a killed run keeps its rows.

    {"benchmark": "bench", "schema": 1,
     "runs": [{"date", "device", "versions", "limits", ...}],
     "rows": [{"name", "run", "workload", "contenders": {name: {...}}, "not_run": {name: why}}]}

A row's ``run`` is an index into ``runs``: ratios hold within one row, whose contenders took turns.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from typing import TYPE_CHECKING, Any

import portattn
from portattn.device import device_key
from portattn.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

SCHEMA = 1
_PACKAGES = ("torch", "triton", "cupy-cuda13x", "flash-attn-4", "nvidia-cudnn-cu13")


def describe_run(device: torch.device) -> dict[str, Any]:
    """Date, device and versions."""
    versions = {"python": platform.python_version(), "portattn": portattn.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.date().isoformat(),
        "device": device_key(device).name,
        "versions": versions,
    }


class Results:
    """Rows by name, and the file that holds them.

    Attributes:
        document: what the file holds.
    """

    def __init__(self, path: Path | None, run: dict[str, Any], *, keep: bool) -> None:
        """Begin a run.

        Args:
            path: the file; None writes nothing.
            run: what `describe_run` says, and limits.
            keep: keep the rows that the file holds.

        Raises:
            ConfigError: the file to keep is no such file, or of another device.
        """
        self._path = path
        self.document: dict[str, Any] = {
            "benchmark": "bench", "schema": SCHEMA, "runs": [], "rows": [],
        }  # fmt: skip
        if keep and path is not None and path.exists():
            self.document = _read(path, run["device"])
        self.document["runs"].append(run)

    @property
    def names(self) -> set[str]:
        """Rows that are there and hold times."""
        return {row["name"] for row in self.document["rows"] if row.get("contenders")}

    def add(self, row: dict[str, Any]) -> None:
        """Put a row in, in place of an older one of its name, and write the file."""
        row = {"name": row["name"], "run": len(self.document["runs"]) - 1, **row}
        rows = self.document["rows"]
        names = [one["name"] for one in rows]
        if row["name"] in names:
            rows[names.index(row["name"])] = row
        else:
            rows.append(row)
        self.write()

    def write(self) -> None:
        """Replace the file in one step."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(self._path.name + ".part")
        part.write_text(json.dumps(self.document, indent=1) + "\n")
        os.replace(part, self._path)


def _read(path: Path, device: str) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        is_ours = document["benchmark"] == "bench" and document["schema"] == SCHEMA
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--out names {path}, which holds no results of portattn bench ({error}); name "
            "another file"
        ) from error
    others = {run["device"] for run in document["runs"]} - {device} if is_ours else {"?"}
    if others:
        raise ConfigError(
            f"--out names {path}, whose rows are of {', '.join(sorted(others))} and not of "
            f"{device}: name another file"
        )
    return document
