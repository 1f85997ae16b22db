"""First contact of the CuPy kernel with a GPU, smallest problem first; from the checkout's root.

    python tests/cupy/gpu_smoke.py                  all stages, each in a process with a time limit
    python tests/cupy/gpu_smoke.py --stage small    one stage, in this process

Then the whole suite, and compute-sanitizer over the stage that touches every branch:

    portattn verify --backend cupy --device cuda
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python tests/cupy/gpu_smoke.py --stage small
    compute-sanitizer --tool racecheck python tests/cupy/gpu_smoke.py --stage small

Without that variable, torch's caching allocator hides reads past a tensor from memcheck.
"""

import argparse
import functools
import itertools
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import portattn  # noqa: E402
import portattn.errors  # noqa: E402
from portattn import masks  # noqa: E402
from portattn.backends.cupy.config import ForwardSm80Config  # noqa: E402
from portattn.backends.registry import kernel  # noqa: E402
from portattn.dispatch import choose  # noqa: E402
from portattn.problem import AttentionProblem  # noqa: E402

LIMITS_S = {"tiny": 120, "small": 400, "configs": 400, "large": 300, "speed": 400}
NAME = "cupy_forward_sm80"


def tensors(dtype, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v, batch=1):
    """Random query, key, value on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    return (
        normal(batch, heads, seqlen_q, head_dim),
        normal(batch, kv_heads, seqlen_k, head_dim),
        normal(batch, kv_heads, seqlen_k, head_dim_v),
    )


def check(label, qkv, **options):
    """Compare with float64; poison what the allocator will hand out for outputs and workspace."""
    config = options.pop("config", None)
    poison = torch.full((1 << 22,), float("nan"), device="cuda")
    del poison
    run = functools.partial(portattn.attention, enable_gqa=True, return_lse=True)
    output, lse = run(*qkv, backend=NAME, config=config, **options)
    again, again_lse = run(*qkv, backend=NAME, config=config, **options)
    torch.cuda.synchronize()
    wide = dict(options)
    if "bias" in wide:
        wide["bias"] = wide["bias"].double()
    law, law_lse = run(*(t.double() for t in qkv), backend="reference", **wide)
    eager, _ = run(*qkv, backend="reference", config={"dtype": "input"}, **options)
    error = (output.double() - law).abs().max().item()
    allowed = 2 * (eager.double() - law).abs().max().item()
    allowed += 2 * torch.finfo(qkv[0].dtype).eps * law.abs().max().item()
    finite = law_lse.isfinite()
    lse_error = (lse.double() - law_lse)[finite].abs().max().item() if finite.any() else 0.0
    good = error <= allowed and lse_error < 1e-4
    good = good and torch.equal(lse[~finite].double(), law_lse[~finite])
    good = good and torch.equal(output, again) and torch.equal(lse, again_lse)
    print(
        f"{'ok  ' if good else 'FAIL'} {label}: {error:.3g} of {allowed:.3g}, lse {lse_error:.3g}",
        flush=True,
    )
    return good


def tiny():
    """One block, one tile."""
    ok = True
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        ok &= check(f"tiny {dtype}", tensors(dtype, 1, 1, 5, 7, 64, 64))
        ok &= check(f"one tile {dtype}", tensors(dtype, 1, 1, 64, 64, 64, 64), is_causal=True)
    return ok


def small():
    """Every branch: partial, id and stepped tiles, cut rows, passes, score terms, odd sizes."""
    half = functools.partial(tensors, torch.float16, 4, 2)
    sinks = torch.tensor([0.5, 2.0, -1.0, 0.0], device="cuda")
    slopes = torch.tensor([0.1, 0.2, 0.0, 0.05], device="cuda")
    bias = torch.randn(1, 4, 150, 210, device="cuda").half()
    ok = check("ragged causal", half(150, 210, 64, 64), is_causal=True, q_offset="end")
    ok &= check("cut rows, sinks", half(20, 4000, 64, 64), sinks=sinks)
    ok &= check(
        "passes, sinks",
        half(300, 300, 64, 64),
        mask=masks.sparse_transformer_strided(16),
        sinks=sinks,
    )
    ok &= check(
        "documents",
        half(300, 300, 64, 64),
        mask=masks.documents([0, 70, 71, 300]) & masks.causal(),
    )
    ok &= check("longformer", half(600, 600, 64, 64), mask=masks.longformer(64, 3, dilation=2))
    ok &= check("empty rows", half(200, 200, 64, 64), mask=masks.QueryRange(20, 90))
    ok &= check("scale < 0", half(150, 150, 64, 64), scale=-0.2, is_causal=True)
    ok &= check("scale 0", half(150, 150, 64, 64), scale=0.0, is_causal=True)
    terms = {"softcap": 4.0, "alibi_slopes": slopes, "bias": bias, "sinks": sinks}
    ok &= check("all terms", half(150, 210, 96, 40), is_causal=True, q_offset="end", **terms)
    for dtype, head_dim in itertools.product(
        (torch.float16, torch.bfloat16, torch.float32), (8, 33, 64, 96, 128, 160, 192, 256)
    ):
        qkv = tensors(dtype, 2, 1, 133, 190, head_dim, head_dim)
        ok &= check(f"{dtype} D{head_dim}", qkv, is_causal=True, q_offset="end")
    return ok


def configs():
    """Every feasible config at D 64 and 128."""
    ok = True
    for dtype, head_dim in ((torch.float16, 64), (torch.bfloat16, 128), (torch.float32, 64)):
        name = str(dtype).removeprefix("torch.")
        problem = AttentionProblem(
            "cuda", name, 1, 4, 2, 700, 700, head_dim, head_dim, device="cuda:0"
        )
        space = kernel(NAME).search_space(problem)
        for values in itertools.product(*(v for k, v in space.items() if k != "head_group")):
            config = ForwardSm80Config(*values, head_group=2)
            if kernel(NAME).infeasible_reasons(problem, config):
                continue
            qkv = tensors(dtype, 4, 2, 700, 700, head_dim, head_dim)
            ok &= check(
                f"{name} D{head_dim} {values}", qkv, mask=masks.sliding_window(200), config=config
            )
    return ok


def large():
    """Lengths that need many items, and offsets past 2^31 elements."""
    ok = check("causal 4096", tensors(torch.bfloat16, 4, 2, 4096, 4096, 128, 128), is_causal=True)
    ok &= check(
        "bigbird 4096", tensors(torch.float16, 4, 4, 4096, 4096, 64, 64), mask=masks.bigbird(64)
    )
    # Rows of a buffer of 2.4e9 elements: the last head starts past 2^31.
    buffer = torch.zeros(1, 3, 1000, 800_000, dtype=torch.float16, device="cuda")
    qkv = [t.expand(1, 3, -1, -1) for t in tensors(torch.float16, 1, 1, 1000, 1000, 64, 64)]
    views = [buffer[..., 64 * n : 64 * n + 64].copy_(t) for n, t in enumerate(qkv)]
    ok &= check("past 2^31", views, is_causal=True)
    return ok


def speed():
    """TFLOP/s of the default and a few other configs, beside torch's FlashAttention-2."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    for head_dim, seqlen, causal in itertools.product((64, 128), (4096, 16384), (False, True)):
        heads = 2048 // head_dim
        qkv = tensors(
            torch.bfloat16, heads, heads, seqlen, seqlen, head_dim, head_dim, 16384 // seqlen
        )
        flops = 4 * 16384 * seqlen * 2048 * (0.5 if causal else 1)
        candidates = {"default": None}
        for block_q, block_k, warps, stages, blocks in (
            (64, 64, 4, 2, 2), (64, 64, 4, 2, 3), (128, 64, 4, 2, 2), (128, 64, 8, 2, 1),
            (128, 128, 8, 2, 1), (128, 32, 4, 3, 2), (64, 128, 4, 2, 1),
        ):  # fmt: skip
            config = ForwardSm80Config(block_q, block_k, warps, stages, blocks)
            candidates[f"{block_q}x{block_k} w{warps} s{stages} b{blocks}"] = config
        for label, config in candidates.items():
            try:
                call = functools.partial(
                    portattn.attention, *qkv, is_causal=causal, backend=NAME, config=config
                )
                rate = flops / milliseconds(call) / 1e9
            except portattn.errors.ConfigError as error:
                print(f"D{head_dim} S{seqlen} causal={causal} {label}: {str(error)[:120]}")
                continue
            print(f"D{head_dim} S{seqlen} causal={causal} {label}: {rate:.0f} TFLOP/s", flush=True)
        with torch.nn.attention.sdpa_kernel(backend):
            rate = flops / milliseconds(functools.partial(sdpa, *qkv, is_causal=causal)) / 1e9
        print(f"D{head_dim} S{seqlen} causal={causal} SDPA flash: {rate:.0f} TFLOP/s", flush=True)
    return True


def milliseconds(call, repeats=10):
    """Median time of a call on the GPU."""
    call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def main():
    """Run one stage here, or all of them, each in a process that may hang or crash alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=LIMITS_S)
    stage = parser.parse_args().stage
    if stage is not None:
        problem = AttentionProblem("cuda", "float16", 1, 1, 1, 64, 64, 64, 64, device="cuda:0")
        print(torch.cuda.get_device_name(), choose(problem, NAME), flush=True)
        sys.exit(0 if globals()[stage]() else 1)
    for name, limit_s in LIMITS_S.items():
        start = time.perf_counter()
        command = [sys.executable, __file__, "--stage", name]
        done = subprocess.run(command, timeout=limit_s, cwd=ROOT, check=False)
        print(
            f"stage {name}: exit code {done.returncode}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        if done.returncode != 0:
            sys.exit(1)


if __name__ == "__main__":
    main()
