"""Records the time of every config of the CPU kernels: what `portattn bench-search` plays.

    python -m benchmarks.search_oracle_cpu --out benchmarks/results/cpu_oracle.json

Every config is checked as in tuning, then all are timed in rounds; a config's time is the smallest
of its samples, so that what else the machine does weighs little.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from portattn.device import device_key
from portattn.tuner import cases, measure, oracle, session, timers
from portattn.tuner.space import enumerate_space
from portattn.tuner.verify import Verifier

if TYPE_CHECKING:
    from portattn.backends.base import ConfigValue

TEXTS = (
    "b1 h4 s512 d64 float32 causal",
    "b1 h4 s512 d64 float32",
    "b1 h4 s1024 d64 float32 sliding_window:128",
    "b1 h4 s1024 d64 float32 longformer:128:16",
    "b1 h4 s512 d128 float32 causal",
    "b1 h4 s512 d64 bfloat16 causal",
    "b1 h8 kv2 s512 d64 float32 causal",
    "b1 h8 sq1 sk4096 d128 float32 offset:end",
)


def record(text: str, seconds: float) -> list[oracle.Table]:
    """One table for each kernel that can run a problem."""
    case = cases.parse(text, "cpu")
    timer, verifier = timers.timer_for("cpu"), Verifier(case)
    tables = []
    for kernel in session.candidates(case.problem, None)[0]:
        outcomes: dict[tuple[ConfigValue, ...], int | str] = {}
        right, runs, times = [], [], []
        for config in enumerate_space(kernel, case.problem).configs:
            verdict = verifier.check(kernel, config)
            values = tuple(config.to_dict().values())
            outcomes[values] = verdict.status
            if verdict.status == "ok":
                run = lambda k=kernel, c=config: k.run(verifier.inputs, c)  # noqa: E731
                right.append(values)
                runs.append(run)
                times.append(timer.sample(run, 1))
        found = measure.interleave(
            timer, runs, times, deadline=time.monotonic() + seconds, min_rounds=5
        )
        outcomes |= zip(right, map(min, found), strict=True)
        default = kernel.default_config(case.problem).to_dict()
        tables.append(
            oracle.Table(
                kernel.name,
                kernel.backend,
                text,
                tuple(default),
                tuple(default.values()),
                outcomes,
            )
        )
        print(
            f"{text}: {kernel.name}, {len(right)} of {len(outcomes)} right, {len(found[0])} rounds"
        )
    return tables


def main() -> None:
    """Record every problem; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds, for each table")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tables: list[oracle.Table] = []
    with torch.no_grad():
        for text in TEXTS:
            tables += record(text, options.seconds)
            options.out.write_text(oracle.dump(device_key("cpu").name, tables), encoding="utf-8")


if __name__ == "__main__":
    main()
