"""Cubins of the decode kernel, compiled without a GPU: no warnings, no spills; and its configs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portattn import masks
from portattn.backends.cupy.config import shared_limit
from portattn.backends.cupy.config_decode import (
    HEADERS,
    DecodeConfig,
    DecodeVariant,
    block_q,
    bytes_under_way,
    default_config,
    infeasible_reasons,
    num_rows,
)
from portattn.backends.cupy.decode import _reciprocal
from portattn.backends.cupy.loader import compile_program
from portattn.backends.registry import kernel
from portattn.problem import AttentionProblem
from tests.cupy.emulated_decode import EmulatedDecode
from tests.cupy.test_loader import included

CAPABILITIES = {"sm_80": (8, 0), "sm_86": (8, 6), "sm_90": (9, 0), "sm_120": (12, 0)}
# (arch, dtype, head_dim, head_dim_v, seqlen_q, aligned, (softcap, alibi, bias)); 4 query heads per
# KV head.
TARGETS = [
    *(
        (arch, "bfloat16", dim, dim, 1, True, (False, False, False))
        for arch in ("sm_80", "sm_90")
        for dim in (64, 128, 256)
    ),
    ("sm_86", "float16", 128, 128, 1, True, (False, False, False)),
    ("sm_120", "float16", 256, 256, 1, True, (False, False, False)),
    ("sm_120", "float16", 256, 256, 9, True, (False, False, False)),
    ("sm_90", "float16", 128, 128, 5, True, (False, False, False)),
    ("sm_90", "float16", 192, 128, 16, True, (False, False, False)),
    ("sm_90", "bfloat16", 128, 128, 1, False, (False, False, False)),
    ("sm_90", "bfloat16", 128, 128, 1, True, (True, True, True)),
    ("sm_90", "bfloat16", 256, 256, 16, True, (True, True, True)),
]


def _problem(dtype="bfloat16", head_dim=128, head_dim_v=128, seqlen_q=1, **fields):
    values = {"batch": 2, "num_heads": 32, "num_kv_heads": 8, "seqlen_k": 8192, **fields}
    return AttentionProblem(
        "cuda", dtype, seqlen_q=seqlen_q, head_dim=head_dim, head_dim_v=head_dim_v, **values
    )


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_default_config_compiles_without_spills(target):
    arch, dtype, head_dim, head_dim_v, seqlen_q, aligned, terms = target
    capability = CAPABILITIES[arch]
    problem = _problem(dtype, head_dim, head_dim_v, seqlen_q)
    config = default_config(problem, capability)
    assert infeasible_reasons(problem, config, capability) == []
    rows = block_q(num_rows(problem))
    variant = DecodeVariant(dtype, head_dim, head_dim_v, rows, aligned, *terms, config)
    compiled = compile_program(variant.program(arch))
    resources = compiled.resources()
    assert "warning" not in compiled.log.lower()
    assert compiled.cubin.startswith(b"\x7fELF")
    # O of 256 columns takes half of the registers: what is only read where rows of work begin and
    # end may lie in memory.
    assert resources.spill_store_bytes <= (256 if head_dim_v > 128 else 0)
    assert resources.registers <= 65536 // (32 * config.num_warps * config.blocks_per_sm)
    assert variant.shared_bytes() <= shared_limit(capability)


def test_defaults_load_enough():
    """Little's law: 3.1 TB/s times 0.8 us over 132 SMs is 19 KB; less than 64 KB is too near."""
    for head_dim in (32, 64, 96, 128, 192, 256):
        problem = _problem(head_dim=head_dim, head_dim_v=head_dim)
        config = default_config(problem, (9, 0))
        assert bytes_under_way(problem, config) >= 65536
    assert default_config(_problem(), (9, 0)) == DecodeConfig(32, 4, 2)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"head_dim": 264}, "264"),
        ({"seqlen_q": 17}, "68"),
        ({"program": masks.streaming_llm(4, 40).program}, "bands and key ranges"),
        ({"batch": 2**20, "seqlen_k": 2**20}, "strips"),
    ],
)
def test_refusals_say_why(fields, reason):
    (refusal,) = EmulatedDecode().unsupported_reasons(_problem(**fields))
    assert reason in refusal


def test_lengths_on_the_device_take_any_number_of_queries():
    problem = _problem(seqlen_q=500, features=frozenset({"kv_lengths"}))
    assert EmulatedDecode().unsupported_reasons(problem) == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DecodeConfig(block_k=24), "block_k is 24"),
        (DecodeConfig(num_warps=3), "num_warps is 3"),
        (DecodeConfig(min_rounds=0), "min_rounds is 0"),
        (DecodeConfig(64, 8, 6), "shared memory"),
        (DecodeConfig(16, 8, 2, 3), "registers"),
    ],
)
def test_infeasible_configs_say_why(config, reason):
    refusals = infeasible_reasons(_problem(head_dim=64, head_dim_v=192), config, (9, 0))
    assert any(reason in refusal for refusal in refusals)


@given(st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1))
def test_divisions_by_what_the_host_knows_are_exact(n, divisor):
    """As decode_work.cuh's divide() does it, in 32 bits."""
    magic, shift = _reciprocal(divisor)
    assert magic % 2**32 >= 2**31
    for value in (n, n // divisor * divisor, max(n // divisor * divisor - 1, 0), 2**31 - 1):
        assert (2 * value * (magic % 2**32) >> 32) >> shift == value // divisor


def test_the_program_has_the_headers_that_it_includes():
    assert included("decode.cu") == set(HEADERS)


def test_the_kernel_is_registered():
    assert kernel("cupy_decode").name == "cupy_decode"
