"""Attention in ONNX Runtime: one exported file with libportattn and without, beside its own ops.

    python -m benchmarks.onnx_attention [--seqlen 8192] [--threads 2] [--repeats 9]

float32, batch 1, 8 heads of 64, one process, the sessions taking turns. Peers: com.microsoft
GroupQueryAttention with local_window_size and MultiHeadAttention with unidirectional, and ai.onnx
Attention-23 with the window as a bool mask (an input). Every session's output is compared with
torch on sampled rows; memory is what a fresh session's first run adds to the process. Writes
benchmarks/results/onnx_attention.json.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from benchmarks.onnx_attention_models import (
    BATCH,
    HEAD_DIM,
    HEADS,
    WINDOW,
    Case,
    make_cases,
    open_exported,
)
from portattn.bench.demo_measure import extra_bytes

RESULTS = Path(__file__).parent / "results" / "onnx_attention.json"


def exact_rows(case: Case, rows: np.ndarray) -> np.ndarray:
    """float64 [heads, rows, head_dim] of the mask's attention at some rows."""
    query, key, value = (
        tensor[0] if tensor.ndim == 4 else tensor.reshape(-1, HEADS, HEAD_DIM).transpose(1, 0, 2)
        for tensor in list(case.feeds.values())[:3]
    )
    scores = query[:, rows].astype(np.float64) @ key.astype(np.float64).transpose(0, 2, 1)
    distance = rows[:, None] - np.arange(key.shape[1])[None, :]
    keep = (distance >= 0) & (distance < (WINDOW if case.mask == "window" else key.shape[1]))
    scores = np.where(keep, scores / np.sqrt(HEAD_DIM), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    output: np.ndarray = weights / weights.sum(-1, keepdims=True) @ value.astype(np.float64)
    return output


def measure(cases: list[Case], repeats: int) -> list[dict[str, Any]]:
    """Memory and error of each case alone, then times with the cases taking turns."""
    records: list[dict[str, Any]] = []
    for case in cases:
        session = case.open()
        nbytes = extra_bytes(functools.partial(case.output, session))
        output = case.output(session)
        rows = np.linspace(0, output.shape[1] - 1, 16).astype(np.int64)
        error = float(np.abs(output[:, rows] - exact_rows(case, rows)).max())
        records.append(
            {"case": case.name, "mask": case.mask, "extra_bytes": nbytes, "max_error": error}
        )
        del session
    sessions = [case.open() for case in cases]
    wall: list[list[float]] = [[] for _ in cases]
    busy: list[list[float]] = [[] for _ in cases]
    for turn in range(repeats + 1):
        for n, (case, session) in enumerate(zip(cases, sessions, strict=True)):
            start, start_cpu = time.perf_counter(), time.process_time()
            session.run(None, case.feeds)
            if turn:
                wall[n].append((time.perf_counter() - start) * 1e3)
                busy[n].append((time.process_time() - start_cpu) * 1e3)
    for record, times, cpu_times in zip(records, wall, busy, strict=True):
        record |= {
            "median_ms": statistics.median(times),
            "min_ms": min(times),
            "max_ms": max(times),
            "median_cpu_ms": statistics.median(cpu_times),
        }
    return records


def memory_growth(threads: int, folder: Path, seqlens: tuple[int, ...]) -> list[dict[str, Any]]:
    """Memory of the window with the library: linear if it doubles with the length."""
    rows = []
    for seqlen in seqlens:
        zeros = np.zeros((BATCH, HEADS, seqlen, HEAD_DIM), np.float32)
        feeds = dict.fromkeys(("query", "key", "value"), zeros)
        session = open_exported(folder / "window.onnx", threads, library=True)
        run = functools.partial(session.run, None, feeds)
        rows.append({"seqlen": seqlen, "extra_bytes": extra_bytes(run)})
    return rows


RATIOS = (
    # what, of which case over the library's, mask, target
    ("window 256 against GroupQueryAttention", "GroupQueryAttention", "window", 12.0),
    ("window 256 against Attention-23 with a mask", "Attention-23, mask", "window", 30.0),
    ("window 256 against its own function body", "portattn, function body", "window", None),
    ("causal against MultiHeadAttention", "MultiHeadAttention", "causal", 2.0),
)


def ratios(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median over median; CPU time beside wall time, which suffers from other processes."""
    found = {(record["case"], record["mask"]): record for record in records}
    rows = []
    for what, name, mask, target in RATIOS:
        peer, ours = found[name, mask], found["portattn, library", mask]
        rows.append(
            {
                "ratio": what,
                "wall": peer["median_ms"] / ours["median_ms"],
                "cpu": peer["median_cpu_ms"] / ours["median_cpu_ms"],
                "target": target,
            }
        )
    return rows


def print_tables(console: Console, record: dict[str, Any]) -> None:
    """Times, memory and ratios."""
    table = Table(title=f"ONNX Runtime {onnxruntime.__version__}, S {record['seqlen']}, float32")
    for n, heading in enumerate(("mask", "session", "ms", "CPU ms", "memory MB", "error")):
        table.add_column(heading, justify="right" if n > 1 else "left")
    for row in record["cases"]:
        table.add_row(
            row["mask"],
            row["case"],
            f"{row['median_ms']:.1f}",
            f"{row['median_cpu_ms']:.1f}",
            f"{row['extra_bytes'] / 1e6:.0f}",
            f"{row['max_error']:.1e}",
        )
    console.print(table)
    for row in record["ratios"]:
        target = f", target {row['target']:g}x" if row["target"] else ""
        console.print(f"{row['ratio']}: {row['wall']:.1f}x (CPU time {row['cpu']:.1f}x){target}")
    for row in record["memory"]:
        console.print(f"window, library, S {row['seqlen']}: {row['extra_bytes'] / 1e6:.0f} MB")


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = make_cases(arguments.seqlen, arguments.threads, folder)
        records = measure(cases, arguments.repeats)
        lengths = tuple(arguments.seqlen * factor for factor in (1, 2, 4))
        memory = memory_growth(arguments.threads, folder, lengths)
    packages = ("onnxruntime", "onnx", "torch", "numpy")
    record = {
        "benchmark": "onnx_attention",
        "device": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": arguments.threads,
        "seqlen": arguments.seqlen,
        **{name: importlib.metadata.version(name) for name in packages},
        "load_average": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cases": records,
        "ratios": ratios(records),
        "memory": memory,
    }
    print_tables(Console(), record)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
