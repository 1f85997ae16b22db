"""The GPU backward beside cuDNN, flash-attn-4 and FlexAttention: the backward alone, bfloat16.

    python -m benchmarks.gpu_backward [--rows dense sparse] [--budget 60] [--output FILE]

A peer's time is that of `torch.autograd.grad` of an output that is there; ours that of the
kernel's backward for the same tensors. Calls take turns, the L2 cache is overwritten before each,
medians of CUDA events. Everything is compiled first, by processes side by side. Rows are written
as they end; none begins past the budget.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib
import json
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from portattn import attention
from portattn.backends import registry
from portattn.backends.base import AttentionGradients, AttentionInputs
from portattn.bench.patterns import Pattern
from portattn.problem import AttentionProblem

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results" / "h100_backward.json"
OWN = ("triton_backward_hopper", "triton_backward")
_TOKENS, _WIDTH = 16384, 2048  # batch * seqlen, heads * head_dim of dense rows


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One problem: batch * seqlen = 16384 and heads * head_dim = 2048 if dense, else 1 and 16."""

    seqlen: int
    head_dim: int
    pattern: Pattern

    @property
    def name(self) -> str:
        """Row name."""
        return f"d{self.head_dim} s{self.seqlen} {self.pattern.text}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of query, key and value."""
        if not self.pattern.is_dense:
            return 1, 16, self.seqlen, self.head_dim
        return max(_TOKENS // self.seqlen, 1), _WIDTH // self.head_dim, self.seqlen, self.head_dim

    @property
    def peers(self) -> tuple[str, ...]:
        """Who else runs it."""
        return ("sdpa_cudnn", "flash_attn_4") if self.pattern.is_dense else ("flex",)


def cases(rows: list[str]) -> list[Case]:
    """The rows asked for."""
    dense = [
        Case(seqlen, head_dim, Pattern(kind))
        for head_dim in (64, 128)
        for seqlen in (4096, 16384)
        for kind in ("full", "causal")
    ]
    sparse = [
        Case(16384, 128, Pattern(kind, values))
        for kind, values in (
            ("sliding_window", (1024,)),
            ("longformer", (512, 64)),
            ("bigbird", (64, 3, 3, 2)),
        )
    ]
    return [*(dense if "dense" in rows else ()), *(sparse if "sparse" in rows else ())]


def own_call(case: Case, name: str, tensors: list[torch.Tensor]) -> Callable[[], object]:
    """A kernel's backward of one of ours."""
    query, key, value, seed = tensors
    mask = case.pattern.mask(case.seqlen)
    with torch.no_grad():
        output, lse = attention(query, key, value, mask, return_lse=True)
    batch, heads, seqlen, head_dim = case.shape
    problem = AttentionProblem(
        "cuda", "bfloat16", batch, heads, heads, seqlen, seqlen, head_dim, head_dim,
        () if mask is None else mask.program, 0, frozenset({"grad", "lse"}), str(query.device),
    )  # fmt: skip
    kernel = registry.kernel(name)
    refused = kernel.unsupported_reasons(problem)
    if refused:
        raise RuntimeError(f"{name} refuses {case.name}: {'; '.join(refused)}")
    config = kernel.default_config(problem)
    inputs = AttentionInputs(
        query, key, value, output, lse, mask, 0, None, head_dim**-0.5, 0.0, None, None, None,
        False,
    )  # fmt: skip
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (query, key, value))
    gradients = AttentionGradients(seed, None, dq, dk, dv, None, None, None)
    return lambda: kernel.backward(inputs, gradients, config)


def peer_call(case: Case, name: str, tensors: list[torch.Tensor]) -> Callable[[], object]:
    """A peer's backward through autograd."""
    seed = tensors[3]
    leaves: Any = [tensor.detach().clone().requires_grad_() for tensor in tensors[:3]]
    output: torch.Tensor
    is_causal = case.pattern.kind == "causal"
    if name == "sdpa_cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            query, key, value = leaves
            output = scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    elif name == "flash_attn_4":
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        flash_attn = importlib.import_module("flash_attn.cute")
        leaves = [tensor.transpose(1, 2).contiguous().detach() for tensor in leaves]
        leaves = [tensor.requires_grad_() for tensor in leaves]
        seed = seed.transpose(1, 2).contiguous()
        result = flash_attn.flash_attn_func(*leaves, causal=is_causal)
        output = result[0] if isinstance(result, tuple) else result
    else:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        from torch.nn.attention.flex_attention import flex_attention

        from portattn.bench.flex_blocks import block_mask
        from portattn.bench.peers_flex import allow_many_compiles

        allow_many_compiles()
        mask_mod = case.pattern.mask_mod(case.seqlen, seed.device)
        assert mask_mod is not None, "a dense pattern has no block mask"
        blocks = block_mask(mask_mod, case.seqlen, case.seqlen, seed.device)
        compiled: Any = torch.compile(flex_attention, dynamic=False)
        output = compiled(*leaves, block_mask=blocks)
    return lambda: torch.autograd.grad(output, leaves, seed, retain_graph=True)


def call_of(case: Case, name: str) -> Callable[[], object]:
    """One contender of a row; it has run once."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    tensors = [torch.randn(case.shape, **options) for _ in range(4)]
    call = own_call(case, name, tensors) if name in OWN else peer_call(case, name, tensors)
    call()
    torch.cuda.synchronize()
    return call


def warm(case: Case, name: str) -> str:
    """Compile one contender into the caches on disk; what went wrong, if anything."""
    try:
        call_of(case, name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def milliseconds(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Times of the calls in turn, for about that long."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    make_event: Any = torch.cuda.Event
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, events.values())) < 5:
        for name, call in calls.items():
            flush.zero_()
            pair = make_event(enable_timing=True), make_event(enable_timing=True)
            pair[0].record()
            call()
            pair[1].record()
            events[name].append(pair)
        torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in events.items()}


def run_row(case: Case) -> dict[str, Any]:
    """Time a case; who could not run says why."""
    calls, failed = dict[str, Any](), dict[str, str]()
    for name in (*OWN, *case.peers):
        try:
            calls[name] = call_of(case, name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    times = milliseconds(calls, 0.25)
    row: dict[str, Any] = {"name": case.name, "shape": case.shape, "not_run": failed}
    row["ms"] = {name: statistics.median(values) for name, values in times.items()}
    if case.pattern.is_dense:
        batch, heads, seqlen, head_dim = case.shape
        share = 0.5 if case.pattern.kind == "causal" else 1.0
        operations = 10 * batch * heads * seqlen**2 * head_dim * share
        row["tflops"] = {name: operations / ms / 1e9 for name, ms in row["ms"].items()}
    return row


def main() -> None:
    """Compile, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=["dense", "sparse"])
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    began, wanted = time.perf_counter(), cases(args.rows)
    # Compilers care for the length only where FlexAttention is one of them.
    jobs = {
        (name, case.head_dim, case.pattern.kind): case
        for case in wanted
        for name in (*OWN, *case.peers)
        if name != "sdpa_cudnn"
    }
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(len(jobs), 14), context) as pool:
        futures = {key: pool.submit(warm, case, key[0]) for key, case in jobs.items()}
        for key, future in futures.items():
            if future.result():
                print("warm-up", *key, future.result()[:200])
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    found: dict[str, Any] = {
        "benchmark": "gpu_backward",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": [],
    }
    for case in wanted:
        if time.perf_counter() - began > args.budget:
            print(f"{case.name}: not run, the budget is spent")
            continue
        row = run_row(case)
        found["rows"].append(row)
        args.output.write_text(json.dumps(found, indent=1) + "\n")
        figures = row.get("tflops", row["ms"])
        shown = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        print(f"{case.name:28s} {shown}", *row["not_run"].items(), flush=True)


if __name__ == "__main__":
    main()
