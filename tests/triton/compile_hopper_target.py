"""Compiles variants of the Hopper forward, prints what each takes as JSON.

    python tests/triton/compile_hopper_target.py [CASE ...]

A process of its own: an impossible combination may abort the compiler's process.
"""

import argparse
import dataclasses
import json

import triton

from portattn.backends.triton.hopper_aot import compile_hopper
from portattn.backends.triton.hopper_config import default_for, infeasible
from portattn.backends.triton.limits import limits_of
from portattn.problem import AttentionProblem

CAUSAL = (1, 1, -(2**62), 0)
SEGMENTS = (1, 11, 0, 1)
STRIDED = (1, 13, 2, 1, -(2**62), 0, 5, 128, 0, 1)
# name -> dtype, head_dim, head_dim_v, program, features, flags of the pass
CASES = {
    "dense_d128": ("bfloat16", 128, 128, (), (), {}),
    "causal_d64": ("bfloat16", 64, 64, CAUSAL, (), {}),
    "dense_d256": ("bfloat16", 256, 256, (), (), {}),
    "causal_d128": ("float16", 128, 128, CAUSAL, (), {"pieces": True}),
    "pieces_d64": ("float16", 64, 64, (), (), {"pieces": True}),
    "pieces_d256": ("bfloat16", 256, 256, CAUSAL, (), {"pieces": True}),
    "causal_d96": ("bfloat16", 96, 96, CAUSAL, (), {}),
    "dense_d192_128": ("bfloat16", 192, 128, (), (), {}),
    "ids_d64": ("bfloat16", 64, 64, SEGMENTS, (), {"ids": True, "packed": True}),
    "ids_d128": (
        "bfloat16", 128, 128, SEGMENTS, (), {"ids": True, "packed": True, "pieces": True},
    ),
    "ids_d256": ("bfloat16", 256, 256, SEGMENTS, (), {"ids": True, "packed": True}),
    "stepped_d64": ("bfloat16", 64, 64, STRIDED, (), {"stepped": True, "first": False}),
    "stepped_d128": (
        "bfloat16", 128, 128, STRIDED, (), {"stepped": True, "first": False, "pieces": True},
    ),
    "stepped_d256": ("bfloat16", 256, 256, STRIDED, (), {"stepped": True, "first": False}),
    "terms_d64": ("bfloat16", 64, 64, CAUSAL, ("softcap", "alibi", "sinks"), {}),
    "terms_d128": ("bfloat16", 128, 128, CAUSAL, ("softcap", "alibi", "sinks"), {}),
    "terms_d256": ("bfloat16", 256, 256, CAUSAL, ("softcap", "alibi", "sinks"), {}),
}  # fmt: skip


def compile_case(case: str) -> dict[str, object]:
    """Compile one case with its default config; sizes that matter to the compiler only."""
    dtype, head_dim, head_dim_v, program, features, flags = CASES[case]
    problem = AttentionProblem(
        "cuda", dtype, 1, 8, 8, 16384, 16384, head_dim, head_dim_v, program, 0,
        frozenset(("lse", *features)),
    )  # fmt: skip
    config = default_for(problem)
    made = compile_hopper(problem, config, **flags)
    return dataclasses.asdict(made) | {
        "config": config.to_dict(),
        "infeasible": infeasible(problem, config, limits_of("sm_90")),
    }


def main() -> None:
    """Print one JSON object: the version of Triton, and what each case takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    cases = {case: compile_case(case) for case in parser.parse_args().cases}
    print(json.dumps({"triton": triton.__version__, "cases": cases}))


if __name__ == "__main__":
    main()
