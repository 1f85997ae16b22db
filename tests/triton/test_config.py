"""Configs of the Triton forward: defaults, what is feasible, refusals; no GPU, no compiler."""

import dataclasses

import pytest

from portattn import masks
from portattn.backends.base import Kernel
from portattn.backends.registry import kernel
from portattn.backends.triton.config import (
    TritonForwardConfig,
    default_for,
    infeasible,
    is_sparse,
    workers_of,
)
from portattn.backends.triton.limits import limits_of
from portattn.errors import ConfigError
from portattn.problem import AttentionProblem

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100")


def problem(dtype="bfloat16", head_dim=128, *, seqlen=4096, features=(), mask=None, device="cuda"):
    program = () if mask is None else mask.program
    return AttentionProblem(
        device, dtype, 2, 8, 4, seqlen, seqlen, head_dim, head_dim, program, 0, frozenset(features)
    )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("features", [(), ("bias", "softcap")])
@pytest.mark.parametrize("mask", [None, masks.local(64, 64)])
def test_defaults_are_feasible(arch, dtype, features, mask):
    limits = limits_of(arch)
    for head_dim in (1, 40, 64, 96, 128, 160, 256):
        for seqlen in (1, 40, 4096, 1 << 20):
            asked = problem(dtype, head_dim, seqlen=seqlen, features=features, mask=mask)
            config = default_for(asked, limits)
            assert infeasible(asked, config, limits) == []
            assert config.tma <= limits.has_tma


def test_measured_defaults_on_hopper():
    limits = limits_of("sm_90")
    assert default_for(problem(seqlen=16384), limits).to_dict() == {
        "block_q": 128,
        "block_k": 128,
        "num_warps": 8,
        "num_stages": 3,
        "partial_stages": 1,
        "tma": True,
        "head_group": 4,  # 2 KV heads of 16 MiB, with 2 query heads each
        "min_piece": 8,
        "precision": "ieee",
    }
    window = default_for(problem(mask=masks.longformer(512, 64)), limits)
    assert (window.block_q, window.block_k, window.num_warps) == (64, 64, 4)


@pytest.mark.parametrize(
    ("mask", "sparse"),
    [
        (masks.causal(), False),
        (masks.prefix_lm(9), False),
        (masks.causal() & masks.padding([3, 4]), False),
        (masks.sliding_window(9), True),
        (masks.longformer(8, 2), True),
        (masks.sparse_transformer_strided(8), True),
        (masks.documents([0, 9, 20]), True),
        (masks.per_head([masks.causal(), masks.local(3, 3)]), True),
    ],
)
def test_sparse_masks_are_known_by_their_program(mask, sparse):
    assert is_sparse(mask.program) is sparse


def test_short_queries_get_short_tiles():
    config = default_for(problem(seqlen=5), limits_of("sm_90"))
    assert config.block_q == 16


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_q": 48}, "block_q is 48"),
        ({"block_k": 16}, "block_k is 16"),
        ({"num_warps": 3}, "num_warps is 3"),
        ({"num_stages": 0}, "num_stages is 0"),
        ({"partial_stages": 2}, "partial_stages is 2"),
        ({"head_group": 0}, "head_group is 0"),
        ({"min_piece": 0}, "min_piece is 0"),
        ({"precision": "tf32"}, "precision is 'tf32'"),
        ({"precision": "tf32x3"}, "for float32"),
        ({"tma": True}, "tma needs sm_90"),
        ({"block_k": 128, "num_stages": 4, "partial_stages": 3}, "bytes of shared memory"),
        ({"block_q": 256, "block_k": 128}, "accumulators a thread"),
    ],
)
def test_infeasible_configs_name_the_field(change, reason):
    config = dataclasses.replace(TritonForwardConfig(num_stages=1, partial_stages=1), **change)
    reasons = infeasible(problem(), config, limits_of("sm_86"))
    assert any(reason in text for text in reasons)


def test_scalar_products_are_bounded():
    config = TritonForwardConfig(64, 64, num_stages=1, partial_stages=1)
    reasons = infeasible(problem("float32"), config, limits_of("sm_90"))
    assert any("scalar FMAs" in text for text in reasons)


def test_workers_are_programs_that_run_at_once():
    limits = limits_of("sm_90", num_sms=132)
    assert workers_of(128, 128, 2, TritonForwardConfig(128, 128, 8, 3, 2, True), limits) == 132
    assert workers_of(128, 128, 2, TritonForwardConfig(64, 64, 4, 3, 2, True), limits) == 264


def test_refusals():
    forward = kernel("triton_forward")
    assert isinstance(forward, Kernel)

    def reasons(**changes):
        return "; ".join(forward.unsupported_reasons(dataclasses.replace(problem(), **changes)))

    assert "the tensors are on cpu" in reasons(device_type="cpu")
    assert "not float64" in reasons(device_type="cpu", dtype="float64")
    assert "head_dim is 257" in reasons(device_type="cpu", head_dim=257)
    assert "head_dim_v is 0" in reasons(device_type="cpu", head_dim_v=0)
    assert "kv_lengths" in reasons(device_type="cpu", features=frozenset({"kv_lengths"}))


def test_configs_survive_json():
    forward = kernel("triton_forward")
    config = TritonForwardConfig(64, 128, 4, 3, 2, True)
    assert forward.config_from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="block_q"):
        forward.config_from_dict(config.to_dict() | {"block_q": "64"})


def test_the_kernels_identity_covers_its_device_code():
    names = {path.rsplit("/", 1)[-1] for path in kernel("triton_forward").source_files()}
    assert names == {
        "forward_kernel.py",
        "primitives.py",
        "variant.py",
        "geometry.py",
        "launch.py",
    }
