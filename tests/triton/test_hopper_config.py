"""What the Hopper forward takes, its defaults, and which configs it refuses."""

import dataclasses
import itertools

import pytest
import triton

from portattn import masks
from portattn.backends import registry
from portattn.backends.triton import hopper_config as configs
from portattn.backends.triton.hopper_config import TritonForwardHopperConfig
from portattn.backends.triton.limits import limits_of
from portattn.errors import ConfigError
from portattn.problem import AttentionProblem

KERNEL = registry.kernel("triton_forward_hopper")
H100 = limits_of("sm_90")
DENSE = AttentionProblem("cuda", "bfloat16", 2, 16, 4, 4096, 4096, 128, 128)
MASKS = {
    "dense": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(1024),
    "longformer": masks.longformer(512, 64),
    "strided": masks.sparse_transformer_strided(128),
    "bigbird": masks.bigbird(64, 3, 3, 2, 0),
}


def problem(**changes):
    return dataclasses.replace(DENSE, **changes)


def program(name):
    mask = MASKS[name]
    return () if mask is None else tuple(mask.program)


def test_it_goes_first_where_it_was_measured_to_be_the_fastest():
    preferred = {n for n in MASKS if KERNEL.is_preferred(problem(program=program(n)))}
    assert preferred == {"dense", "causal", "window"}
    assert KERNEL.is_preferred(problem(seqlen_q=17))  # 4 heads share keys
    assert not KERNEL.is_preferred(problem(seqlen_q=16))


@pytest.mark.parametrize("name", MASKS)
def test_defaults_are_feasible(name):
    for head_dim, head_dim_v, seqlen in itertools.product(
        (1, 40, 64, 96, 128, 192, 256), (8, 64, 128, 200, 256), (1, 1000, 65536)
    ):
        for features in (frozenset(), frozenset({"alibi", "softcap", "sinks", "lse"})):
            case = problem(
                head_dim=head_dim, head_dim_v=head_dim_v, seqlen_q=seqlen, seqlen_k=seqlen,
                program=program(name), features=features,
            )  # fmt: skip
            config = configs.default_for(case)
            assert configs.infeasible(case, config, H100) == [], (case, config)


def test_defaults_follow_the_problem():
    dense = configs.default_for(problem(seqlen_q=16384, seqlen_k=16384))
    assert (dense.block_k, dense.num_stages) == (128, 2)
    causal = configs.default_for(problem(program=program("causal")))
    assert causal.block_k == 128
    assert configs.default_for(problem(program=program("window"))).block_k == 128
    assert configs.default_for(problem(program=program("longformer"))).block_k == 128
    narrow = problem(program=tuple(masks.longformer(128, 64).program))
    assert configs.default_for(narrow).block_k == 64
    for block, block_k in ((128, 128), (256, 128), (64, 64), (192, 64)):
        drawn = problem(program=tuple(masks.RandomBlocks(block, 8, 0).program))
        assert configs.default_for(drawn).block_k == block_k
    tall = configs.default_for(problem(head_dim=64, head_dim_v=64))
    assert tall.block_q == (192 if triton.__version__.startswith("3.6.") else 128)
    short = problem(
        head_dim=64, head_dim_v=64, seqlen_q=1024, seqlen_k=1024, program=program("causal")
    )
    assert configs.default_for(short).block_q == 128
    # As many heads at a time as the L2 cache holds: two of 16384 keys, with their query heads.
    assert dense.head_group == 2 * DENSE.group_size
    # A window reads few of them at a time; a stride reads all.
    for name, heads in (("window", 4), ("longformer", 4), ("strided", 1)):
        long = problem(program=program(name), seqlen_q=65536, seqlen_k=65536)
        assert configs.default_for(long).head_group == heads * DENSE.group_size, name
    packed = masks.documents([0, 30000, 65536])
    for mask, heads in ((packed, 4), (packed & masks.causal(), 2)):
        long = problem(program=tuple(mask.program), seqlen_q=65536, seqlen_k=65536)
        assert configs.default_for(long).head_group == heads * DENSE.group_size


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_q": 64}, "block_q is 64; it must be one of (128, 192)"),
        ({"block_k": 96}, "block_k is 96; it must be one of (64, 128)"),
        ({"num_stages": 1}, "num_stages is 1"),
        ({"registers": 248}, "registers is 248; it must be one of (216, 224, 232, 240)"),
        ({"block_q": 192}, "registers is 232; it must be one of (160,)"),
        ({"head_group": 0}, "head_group is 0; it must be at least 1"),
        ({"min_piece": 0}, "min_piece is 0; it must be at least 1"),
        (
            {"block_q": 192, "registers": 160, "num_stages": 3},
            "bytes of shared memory; sm_90 has 232448",
        ),
        ({"block_q": 192, "registers": 160}, "holds 160 registers a thread"),
    ],
)
def test_what_cannot_run_is_refused(changes, reason):
    config = dataclasses.replace(TritonForwardHopperConfig(), **changes)
    assert any(reason in text for text in configs.infeasible(DENSE, config, H100))


def test_the_output_has_a_buffer_of_its_own_where_that_fits():
    config = TritonForwardHopperConfig()
    assert not configs.output_in_query((128, 128), config)
    assert not configs.output_in_query((64, 128), config)
    narrow = dataclasses.replace(config, block_k=64)
    assert configs.output_in_query((256, 256), narrow)
    # A query's rows have no room for wider or narrower ones of values.
    assert not configs.output_in_query((256, 128), narrow)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "it computes float16 and bfloat16, not float32"),
        ({"head_dim": 257}, "head_dim is 257; it computes 1 to 256"),
        ({"seqlen_k": 0}, "there are no keys"),
        ({"features": frozenset({"kv_lengths"})}, "it has no kv_lengths"),
        ({"features": frozenset({"bias"})}, "it has no bias"),
        ({"features": frozenset({"grad"})}, "it has no backward"),
        (
            {"program": tuple((masks.dilated(64, 2) | masks.dilated(64, 3)).program)},
            "the mask strides over [2, 3] keys; it takes one stride beside 1",
        ),
        ({"device_type": "cpu"}, "needs sm_90 (Hopper); the device is cpu"),
    ],
)
def test_what_it_does_not_compute_is_refused_by_name(changes, reason):
    assert any(reason in text for text in KERNEL.unsupported_reasons(problem(**changes)))


def test_strides_of_programs():
    assert configs.tile_steps(()) == frozenset()
    assert configs.tile_steps(program("causal")) == frozenset()
    assert configs.tile_steps(program("strided")) == {128}
    assert configs.tile_steps(tuple(masks.dilated(64, 1).program)) == frozenset()


def test_configs_come_back_from_the_database():
    config = configs.default_for(DENSE)
    assert KERNEL.config_from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="registers"):
        KERNEL.config_from_dict(config.to_dict() | {"registers": "many"})


def test_the_search_space_holds_feasible_configs():
    for head_dim in (64, 128, 256):
        case = problem(head_dim=head_dim, head_dim_v=head_dim)
        space = KERNEL.search_space(case)
        found = [
            TritonForwardHopperConfig(**dict(zip(space, values, strict=True)))
            for values in itertools.product(*space.values())
        ]
        feasible = [config for config in found if not configs.infeasible(case, config, H100)]
        assert 10 < len(feasible) < len(found)


def test_its_sources_are_files():
    from pathlib import Path

    assert all(Path(path).is_file() for path in KERNEL.source_files())
