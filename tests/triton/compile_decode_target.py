"""Compiles the decode's default configs for one architecture, prints what each takes as JSON.

    python tests/triton/compile_decode_target.py sm_90 [CASE ...]

A process of its own per architecture: an impossible combination may abort the compiler's process.
"""

import argparse
import json

from portattn.backends.triton.decode_aot import compile_decode
from portattn.backends.triton.decode_config import decode_footprint, default_for, infeasible
from portattn.backends.triton.limits import limits_of
from portattn.problem import AttentionProblem

PLAIN = ("kv_lengths",)
RICH = ("kv_lengths", "lse", "softcap", "alibi", "bias", "sinks")
# name -> dtype, head_dim, query heads per KV head, seqlen_q, features
CASES = {
    "d128": ("bfloat16", 128, 4, 1, PLAIN),
    "d64": ("bfloat16", 64, 8, 1, PLAIN),
    "d256": ("bfloat16", 256, 4, 1, PLAIN),
    "float16_d96": ("float16", 96, 1, 1, ("lse",)),
    "rows_32": ("bfloat16", 128, 4, 8, PLAIN),
    "rows_64": ("bfloat16", 128, 8, 64, PLAIN),
    "rows_64_d256": ("bfloat16", 256, 8, 64, PLAIN),
    "rich_d64": ("bfloat16", 64, 4, 1, RICH),
    "rich_d128": ("bfloat16", 128, 8, 2, RICH),
    "rich_rows_64": ("bfloat16", 128, 8, 64, RICH),
    "float32_d64": ("float32", 64, 4, 1, PLAIN),
    "float32_d128": ("float32", 128, 4, 1, PLAIN),
    "float32_d256": ("float32", 256, 4, 1, PLAIN),
}


def compile_case(arch: str, case: str) -> dict[str, object]:
    """Compile one case; sizes that matter to the compiler only."""
    dtype, head_dim, group, seqlen_q, features = CASES[case]
    problem = AttentionProblem(
        "cuda", dtype, 16, 8 * group, 8, seqlen_q, 8192, head_dim, head_dim, (), 0,
        frozenset(features),
    )  # fmt: skip
    limits = limits_of(arch)
    config = default_for(problem, limits)
    made = compile_decode(problem, config, arch)
    return {
        "config": config.to_dict(),
        "infeasible": infeasible(problem, config, limits),
        "shared_bytes": made.shared_bytes,
        "model_bytes": decode_footprint(problem, config, limits).shared_bytes,
        "limit_bytes": limits.shared_bytes,
        "registers": made.registers,
        "spill_bytes": made.spill_bytes,
        "copies": [n for n in ("cp.async.cg", "cp.async.ca") if n in made.text],
        "counter_is_acquire_release": "atom.global.gpu.acq_rel.add" in made.text
        or "acq_rel.gpu" in made.text,
    }


def main() -> None:
    """Compile the cases of the command line's architecture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arch")
    parser.add_argument("cases", nargs="*", default=["d128"])
    args = parser.parse_args()
    print(json.dumps({case: compile_case(args.arch, case) for case in args.cases}))


if __name__ == "__main__":
    main()
