"""Cubins of every architecture, compiled without a GPU: no warnings, ceilings on spills."""

import pytest

from portattn.backends.cupy.config import Variant, default_config, infeasible_reasons, shared_limit
from portattn.backends.cupy.loader import compile_program
from portattn.problem import AttentionProblem

CAPABILITIES = {
    "sm_80": (8, 0),
    "sm_86": (8, 6),
    "sm_90": (9, 0),
    "sm_100": (10, 0),
    "sm_120": (12, 0),
}
TERM_NAMES = ("softcap", "alibi", "bias")
NO_TERMS = (False, False, False)
ALL_TERMS = (True, True, True)

# (arch, dtype, head_dim, head_dim_v, aligned, (softcap, alibi, bias)) -> most bytes of spill
# stores a thread, as ptxas of NVRTC 13.5 needed; default configs of 16-bit inputs nearly none.
# docs/targets.md has every architecture.
CEILINGS = {
    **{
        (arch, "float16", dim, dim, True, NO_TERMS): 0
        for arch in ("sm_80", "sm_86", "sm_90", "sm_120")
        for dim in (64, 128, 256)
    },
    # Pointers and counters, read once a tile.
    ("sm_80", "float16", 64, 64, True, NO_TERMS): 16,
    ("sm_90", "float16", 64, 64, True, NO_TERMS): 16,
    ("sm_80", "float16", 128, 128, True, NO_TERMS): 16,
    ("sm_86", "float16", 64, 64, True, NO_TERMS): 16,
    # Four words that start at 0 as well.
    ("sm_120", "float16", 64, 64, True, NO_TERMS): 72,
    ("sm_90", "float16", 128, 128, True, NO_TERMS): 16,
    ("sm_90", "bfloat16", 128, 128, True, NO_TERMS): 16,
    ("sm_100", "bfloat16", 128, 128, True, NO_TERMS): 64,
    ("sm_90", "bfloat16", 96, 192, True, NO_TERMS): 0,
    ("sm_90", "bfloat16", 128, 128, True, ALL_TERMS): 128,
    ("sm_86", "float16", 128, 64, False, NO_TERMS): 0,
    ("sm_90", "float32", 64, 64, True, NO_TERMS): 0,
    ("sm_86", "float32", 128, 128, True, NO_TERMS): 0,
    # FMA operands and 128 accumulators do not fit 255 registers.
    ("sm_120", "float32", 256, 256, True, NO_TERMS): 512,
}
# What every run compiles beside the architectures that are tuned for; the rest is slow.
QUICK = {
    ("sm_86", "float16", 128, 128, True, NO_TERMS),
    ("sm_86", "float16", 128, 64, False, NO_TERMS),
    ("sm_86", "float32", 128, 128, True, NO_TERMS),
    ("sm_120", "float16", 128, 128, True, NO_TERMS),
}
TARGETS = [
    target if target[0] in ("sm_80", "sm_90") or target in QUICK
    else pytest.param(target, marks=pytest.mark.slow)
    for target in CEILINGS
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_default_config_compiles(target):
    arch, dtype, head_dim, head_dim_v, aligned, terms = target
    capability = CAPABILITIES[arch]
    features = frozenset(name for name, there in zip(TERM_NAMES, terms, strict=True) if there)
    problem = AttentionProblem(
        "cuda", dtype, 1, 8, 8, 4096, 4096, head_dim, head_dim_v, (), 0, features
    )
    config = default_config(problem, capability)
    assert infeasible_reasons(problem, config, capability) == []
    variant = Variant(dtype, head_dim, head_dim_v, aligned, *terms, config)
    compiled = compile_program(variant.program(arch))
    resources = compiled.resources()
    assert "warning" not in compiled.log.lower()
    assert compiled.cubin.startswith(b"\x7fELF")
    assert resources.spill_store_bytes <= CEILINGS[target]
    assert resources.registers <= 65536 // (32 * config.num_warps * config.blocks_per_sm)
    assert variant.shared_bytes() <= shared_limit(capability)
