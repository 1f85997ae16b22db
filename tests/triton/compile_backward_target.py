"""Compiles the backward's default configs for one architecture, prints what each takes as JSON.

    python tests/triton/compile_backward_target.py sm_90 [CASE ...]

A process of its own per architecture: an impossible combination may abort the compiler's process.
"""

import argparse
import dataclasses
import json

from portattn.backends.triton.backward_aot import compile_backward
from portattn.backends.triton.backward_config import default_for, infeasible, shared_bytes
from portattn.backends.triton.limits import limits_of
from portattn.problem import AttentionProblem

ALL_TERMS = frozenset({"lse", "grad", "softcap", "alibi", "bias", "sinks"})
RICH = {"ids": True, "pieces": True, "first": False, "stepped": True, "sums": 1}
# name -> dtype, head_dim, features, flags of the launch
CASES = {
    "plain_d64": ("bfloat16", 64, frozenset({"grad"}), {}),
    "plain_d128": ("bfloat16", 128, frozenset({"grad"}), {}),
    "plain_d256": ("float16", 256, frozenset({"grad"}), {}),
    "float32_d64": ("float32", 64, frozenset({"grad"}), {}),
    "rich_d64": ("bfloat16", 64, ALL_TERMS, RICH),
    "hopper_d64": ("bfloat16", 64, frozenset({"grad"}), {}),
    "hopper_d128": ("float16", 128, frozenset({"grad"}), {}),
    "hopper_rich": ("bfloat16", 64, frozenset({"grad"}), {"stepped": True, "ids": True}),
}


def problem_of(dtype: str, head_dim: int, features: frozenset[str]) -> AttentionProblem:
    """Sizes that matter to the compiler only."""
    return AttentionProblem(
        "cuda", dtype, 1, 8, 8, 4096, 4096, head_dim, head_dim, (), 0, features
    )


def compile_plain(arch: str, case: str) -> dict[str, object]:
    """Both main kernels of the plain backward."""
    dtype, head_dim, features, flags = CASES[case]
    problem, limits = problem_of(dtype, head_dim, features), limits_of(arch)
    config = default_for(problem, limits)
    made: dict[str, object] = {"infeasible": infeasible(problem, config, limits)}
    for part in ("column", "row"):
        compiled = compile_backward(problem, config, arch, part, **flags)
        size = 4 if dtype == "float32" else 2
        made[part] = {
            "shared_bytes": compiled.shared_bytes,
            "model_bytes": shared_bytes(
                config, part, head_dim, head_dim, size, limits, bias="bias" in features
            ),
            "limit_bytes": limits.shared_bytes,
            "spill_bytes": compiled.spill_bytes,
            "matrix_instructions": [
                name
                for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")
                if name in compiled.text
            ],
        }
    return made


def compile_gluon(case: str) -> dict[str, object]:
    """The Hopper backward."""
    from portattn.backends.triton import hopper_backward_config as configs
    from portattn.backends.triton.hopper_backward_aot import compile_hopper_backward

    dtype, head_dim, features, flags = CASES[case]
    problem = problem_of(dtype, head_dim, features)
    config = configs.default_for(problem)
    made = compile_hopper_backward(problem, config, accumulate=bool(flags), **flags)
    width = configs.width_of(head_dim, head_dim)
    return {
        "infeasible": configs.infeasible(problem, config, limits_of("sm_90")),
        "model_bytes": configs.shared_bytes(width, config.num_stages),
        **dataclasses.asdict(made),
    }


def main() -> None:
    """Compile the cases of the command line's architecture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arch")
    parser.add_argument("cases", nargs="*", default=["plain_d128"])
    args = parser.parse_args()
    made = {
        case: compile_gluon(case) if case.startswith("hopper") else compile_plain(args.arch, case)
        for case in args.cases
    }
    print(json.dumps(made))


if __name__ == "__main__":
    main()
