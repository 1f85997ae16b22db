"""The Triton forward beside its peers on one GPU, in one run: dense, causal and sparse rows.

    python benchmarks/h100_forward.py [--quick] [--out FILE]

Peers are torch's SDPA (flash and cuDNN) and compiled FlexAttention with its recompile limit
lifted. Every portattn config is checked on sampled rows against float64 before it is timed. All
contenders of a row run interleaved, one call each in turn, the L2 cache overwritten before each;
medians and the 20 % to 80 % spread are reported, and the matmul ceiling is measured in the same
run. Dense rows count 4 * B * H * S^2 * D operations, causal rows half.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from h100_rows import Reference, Row, dense_row, sparse_rows
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from portattn import masks
from portattn.backends.base import AttentionInputs
from portattn.backends.triton.config import TritonForwardConfig
from portattn.backends.triton.forward import TritonForward
from portattn.problem import AttentionProblem

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[[], Any]

KERNEL = TritonForward()


def measure(contenders: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile of each contender's milliseconds, calls interleaved."""
    # Overwrites the L2 cache, and keeps the GPU busy while the host prepares the call.
    flush = torch.empty(768 << 20, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
        n: [] for n in contenders
    }
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            run()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    result = {}
    for name, pairs in events.items():
        times = sorted(begin.elapsed_time(end) for begin, end in pairs)
        low, middle, high = (times[int(len(times) * q)] for q in (0.2, 0.5, 0.8))
        result[name] = {"median_ms": middle, "p20_ms": low, "p80_ms": high}
    return result


def own_config(
    block_q: int, block_k: int, num_warps: int, num_stages: int, tma: bool, head_group: int
) -> TritonForwardConfig:
    """A config with at most two stages for partial tiles, as the defaults have."""
    return TritonForwardConfig(
        block_q, block_k, num_warps, num_stages, min(num_stages, 2), tma, head_group
    )


def own_contenders(
    row: Row, inputs: AttentionInputs, reference: Reference, rounds: int
) -> dict[str, Run]:
    """The default config and the fastest one found, checked."""
    problem = AttentionProblem(
        "cuda", "bfloat16", row.batch, row.num_heads, row.num_heads, row.seqlen, row.seqlen,
        row.head_dim, row.head_dim, () if row.mask is None else row.mask.program, 0,
        frozenset({"lse"}), "cuda:0",
    )  # fmt: skip
    default = KERNEL.default_config(problem)
    assert isinstance(default, TritonForwardConfig)

    def runner(config: TritonForwardConfig) -> Run:
        return lambda: KERNEL.run(inputs, config)

    def fastest(configs: list[TritonForwardConfig]) -> TritonForwardConfig:
        runs = {}
        for config in configs:
            try:
                inputs.output.fill_(math.nan)
                KERNEL.run(inputs, config)
            except triton.runtime.errors.OutOfResources as error:
                print(f"  {config}: {error}")
                continue
            reference.check(f"{row.name} {config}", inputs.output, inputs.lse)
            runs[config] = runner(config)
        times = measure({str(config): run for config, run in runs.items()}, rounds)
        for config in runs:
            print(
                f"  {times[str(config)]['median_ms']:8.4f} ms {tuple(config.to_dict().values())}"
            )
        return min(runs, key=lambda config: times[str(config)]["median_ms"])

    shapes = [own_config(*shape, default.head_group) for shape in row.configs]
    feasible = [c for c in shapes if not KERNEL.infeasible_reasons(problem, c)]
    best = fastest([default, *(c for c in feasible if c != default)])
    grouped = [
        dataclasses.replace(best, head_group=n) for n in (1, 2, 4, 8, 16) if n <= row.num_heads
    ]
    if row.operations is None:
        grouped += [dataclasses.replace(best, min_piece=n) for n in (16, 32)]
        grouped += [dataclasses.replace(best, partial_stages=best.num_stages)]
    best = fastest(grouped)
    contenders = {f"portattn {tuple(best.to_dict().values())}": runner(best)}
    contenders["portattn default"] = runner(default)
    return contenders


def peers(row: Row, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, Run]:
    """SDPA where it has the mask, and FlexAttention."""
    contenders: dict[str, Run] = {}
    if row.operations is not None:

        def sdpa(backend: SDPBackend) -> Run:
            def run() -> torch.Tensor:
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(
                        query, key, value, is_causal=row.mask is not None
                    )

            return run

        contenders["SDPA flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
        contenders["SDPA cuDNN"] = sdpa(SDPBackend.CUDNN_ATTENTION)
    block_mask = None
    if row.mask_mod is not None:
        block_mask = create_block_mask(
            row.mask_mod, None, None, row.seqlen, row.seqlen, _compile=True
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    contenders["FlexAttention"] = lambda: compiled(query, key, value, block_mask=block_mask)
    return contenders


def run_row(row: Row, rounds: int) -> dict[str, Any]:
    """One line: check, search, time."""
    torch.manual_seed(0)
    sizes = (row.batch, row.num_heads, row.seqlen, row.head_dim)
    query, key, value = (torch.randn(sizes, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    output, lse = torch.empty_like(query), torch.empty(sizes[:3], device="cuda")
    inputs = AttentionInputs(
        query, key, value, output, lse, row.mask, 0, None, row.head_dim**-0.5, 0.0, None, None,
        None, False,
    )  # fmt: skip
    reference = Reference(row, query, key, value)
    contenders = own_contenders(row, inputs, reference, max(5, rounds // 4))
    for name, run in peers(row, query, key, value).items():
        reference.check(f"{row.name} {name}", run())
        contenders[name] = run
    times: dict[str, dict[str, float]] = measure(contenders, rounds)
    return {
        "row": row.name,
        "head_dim": row.head_dim,
        "seqlen": row.seqlen,
        "operations": row.operations,
        "times": times,
    }


def ceiling_tflops(rounds: int) -> float:
    """bfloat16 matmul of 8192^3 on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = measure({"matmul": lambda: a @ b}, rounds)
    return 2 * 8192**3 / times["matmul"]["median_ms"] / 1e9


def host_us(calls: int = 300) -> float:
    """Host microseconds of one call of a small problem, plan and config cached."""
    query, key, value, output = (
        torch.randn(1, 1, 128, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    inputs = AttentionInputs(
        query,
        key,
        value,
        output,
        None,
        masks.causal(),
        0,
        None,
        0.125,
        0.0,
        None,
        None,
        None,
        False,
    )
    config = TritonForwardConfig(64, 64, 4, 3, 2, True)
    KERNEL.run(inputs, config)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        KERNEL.run(inputs, config)
    return (time.perf_counter() - started) / calls * 1e6


def report(line: dict[str, Any], ceiling: float) -> None:
    """Print one row's contenders."""
    print(f"{line['row']}  D{line['head_dim']}  S={line['seqlen']}", flush=True)
    for name, t in line["times"].items():
        text = f"  {t['median_ms']:8.4f} ms [{t['p20_ms']:.4f}, {t['p80_ms']:.4f}]"
        if line["operations"] is not None:
            tflops = line["operations"] / t["median_ms"] / 1e9
            t["tflops"], t["of_ceiling"] = tflops, tflops / ceiling
            text += f"  {tflops:6.1f} TFLOP/s  {tflops / ceiling:6.1%} of matmul"
        t["flex_ratio"] = line["times"]["FlexAttention"]["median_ms"] / t["median_ms"]
        print(f"{text}  {t['flex_ratio']:6.2f}x FlexAttention  {name}", flush=True)


def main() -> None:
    """Run all rows, writing the results after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="D128 S=16384 and the sparse rows only"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h100_forward.json"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--budget-s", type=float, default=330.0, help="start no row after this")
    args = parser.parse_args()
    started = time.monotonic()
    # Past its limit FlexAttention falls back to an unfused path without an error.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 10000
    ceiling = ceiling_tflops(args.rounds)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "ceiling_tflops": ceiling,
        "host_us": host_us(),
        "rows": [],
        "not_run": [],
    }
    print(
        f"{result['device']}: matmul {ceiling:.0f} TFLOP/s, host {result['host_us']:.1f} us a call"
    )
    rows = [dense_row(name, 16384, 128) for name in ("dense", "causal")] + sparse_rows()
    if not args.quick:
        sizes = [(4096, 128), (16384, 64), (4096, 64), (16384, 256), (4096, 256)]
        rows += [dense_row(name, s, d) for s, d in sizes for name in ("dense", "causal")]
    for row in rows:
        if time.monotonic() - started > args.budget_s:
            result["not_run"].append(f"{row.name} D{row.head_dim} S={row.seqlen}")
            continue
        line = run_row(row, args.rounds)
        report(line, ceiling)
        result["rows"].append(line)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.monotonic() - started:.0f} s; not run: {result['not_run'] or 'none'}")


if __name__ == "__main__":
    main()
