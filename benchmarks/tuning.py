"""What `portattn tune` with no arguments gains here, and whether it holds in fresh processes.

    python -m benchmarks.tuning [--device cpu] [--budget 60] [--out FILE]

Tunes the default problems of a device into an empty database, then compares every stored config
with its kernel's default again: `portattn confirm`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from portattn.device import device_key
from portattn.tuner import TuningReport, tune
from portattn.tuner.stored import confirm_stored
from portattn.tuning_db.store import Store


def gains(report: TuningReport) -> list[dict[str, Any]]:
    """Of each kernel and problem what was found."""
    return [
        {
            "problem": problem.label,
            "kernel": kernel.name,
            "fastest": kernel.name == problem.fastest,
            "tried": kernel.tried,
            "feasible": kernel.feasible,
            "default_ns": kernel.default_ns,
            "best_ns": kernel.best_ns,
            "gain": round(kernel.gain, 4),
            "params": kernel.params,
            "unconfirmed": kernel.unconfirmed,
            "rejected": len(kernel.rejected),
        }
        for problem in report.problems
        for kernel in problem.kernels
    ]


def main() -> None:
    """Tune, confirm, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--seconds", type=float, default=1.0, help="of confirming, for each row")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    key = device_key(options.device)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(str(Path(folder) / "tuning.db"))
        report = tune(device=options.device, budget_seconds=options.budget, store=store)
        rows = list(confirm_stored(store, key, options.device, seconds=options.seconds))
    found = gains(report)
    fastest = [one["gain"] for one in found if one["fastest"]]
    content = {
        "benchmark": "tuning",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": key.name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "seconds": round(report.seconds, 1),
        "left_out": list(report.left_out),
        "gain": round(math.exp(sum(map(math.log, fastest)) / max(len(fastest), 1)), 4),
        "found": found,
        "confirmed": [row.to_json() for row in rows],
    }
    for one in found:
        print(f"{one['problem']:45} {one['kernel']:15} {one['tried']:4} tried, {one['gain']:.3f}x")
    for row in rows:
        text = row.confirmation.text if row.confirmation is not None else ""
        print(f"{row.label:45} {row.kernel:15} {row.status} {text}")
    print(
        f"{content['seconds']} s, geometric mean of the fastest kernels' gains {content['gain']}"
    )
    if options.out is not None:
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
