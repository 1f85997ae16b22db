"""Compiles the forward's default configs for one architecture, prints what each takes as JSON.

    python tests/triton/compile_target.py sm_90 [CASE ...]

A process of its own per architecture: an impossible combination may abort the compiler's process.
"""

import argparse
import json

from portattn.backends.triton.aot import compile_forward
from portattn.backends.triton.config import default_for, infeasible
from portattn.backends.triton.limits import forward_footprint, limits_of
from portattn.problem import AttentionProblem

WINDOW = (1, 1, -256, 256)
TERMS = ("lse", "softcap", "alibi", "bias", "sinks")
# name -> dtype, head_dim, program, features, flags of the pass
RICH = {"ids": True, "pieces": True, "first": False}
CASES = {
    "dense_d128": ("bfloat16", 128, (), ("lse",), {}),
    "rich_d64": ("bfloat16", 64, WINDOW, TERMS, RICH),
    "dense_d64": ("bfloat16", 64, (), ("lse",), {}),
    "dense_d256": ("bfloat16", 256, (), ("lse",), {}),
    "sparse_d64": ("bfloat16", 64, WINDOW, ("lse",), {"pieces": True}),
    "sparse_d128": ("bfloat16", 128, WINDOW, ("lse",), {"pieces": True}),
    "stepped_d128": ("bfloat16", 128, WINDOW, ("lse",), {"pieces": True, "stepped": True}),
    "rich_d128": ("bfloat16", 128, WINDOW, TERMS, RICH),
    "rich_d256": ("bfloat16", 256, WINDOW, TERMS, RICH),
    "float16_d96": ("float16", 96, (), ("lse",), {}),
    "float32_d64": ("float32", 64, (), ("lse",), {}),
    "float32_d128": ("float32", 128, (), ("lse",), {}),
    "float32_d256": ("float32", 256, (), ("lse",), {}),
}


def compile_case(arch: str, case: str) -> dict[str, object]:
    """Compile one case; sizes that matter to the compiler only."""
    dtype, head_dim, program, features, flags = CASES[case]
    problem = AttentionProblem(
        "cuda", dtype, 1, 8, 8, 4096, 4096, head_dim, head_dim, program, 0, frozenset(features)
    )  # fmt: skip
    limits = limits_of(arch)
    config = default_for(problem, limits)
    made = compile_forward(problem, config, arch, **flags)
    model = forward_footprint(
        block_q=config.block_q,
        block_k=config.block_k,
        head_dim=head_dim,
        head_dim_v=head_dim,
        element_bytes=4 if dtype == "float32" else 2,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        partial_stages=config.partial_stages,
        bias="bias" in features,
        split_float32=False,
        limits=limits,
    )
    return {
        "config": config.to_dict(),
        "infeasible": infeasible(problem, config, limits),
        "shared_bytes": made.shared_bytes,
        "model_bytes": model.shared_bytes,
        "limit_bytes": limits.shared_bytes,
        "registers": made.registers,
        "spill_bytes": made.spill_bytes,
        "matrix_instructions": [
            name
            for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")
            if name in made.text
        ],
        "copies": [n for n in ("cp.async.bulk.tensor", "cp.async.cg") if n in made.text],
        "counter_is_acquire_release": "atom.global.gpu.acq_rel.add" in made.text
        or "acq_rel.gpu" in made.text,
    }


def main() -> None:
    """Compile the cases of the command line's architecture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arch")
    parser.add_argument("cases", nargs="*", default=["dense_d128", "rich_d64"])
    args = parser.parse_args()
    print(json.dumps({case: compile_case(args.arch, case) for case in args.cases}))


if __name__ == "__main__":
    main()
