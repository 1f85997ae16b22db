"""What fits a device, what is refused, and the kernel's argument."""

import dataclasses
import itertools

import pytest

from portattn.backends.cupy import config as configs
from portattn.backends.cupy.config import ForwardSm80Config
from portattn.backends.cupy.forward_sm80 import CupyForwardSm80
from portattn.backends.cupy.params import layout, pack
from portattn.backends.registry import kernel
from portattn.errors import ConfigError
from portattn.problem import AttentionProblem

PROBLEM = AttentionProblem("cuda", "bfloat16", 2, 8, 2, 1000, 1000, 128, 128)


class OnDevice(CupyForwardSm80):
    """As on a device of compute capability 8.6, wherever the test runs."""

    def _capability(self, problem):
        return (8, 6)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)])
def test_defaults_are_feasible_everywhere(capability):
    dims = (1, 32, 64, 100, 128, 192, 256)
    for dtype, head_dim, head_dim_v, seqlen in itertools.product(
        configs.DTYPE_CODES, dims, dims, (1, 5000)
    ):
        problem = AttentionProblem("cuda", dtype, 1, 1, 1, seqlen, seqlen, head_dim, head_dim_v)
        config = configs.default_config(problem, capability)
        assert configs.infeasible_reasons(problem, config, capability) == [], problem


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_q": 96}, "block_q is 96"),
        ({"block_k": 48}, "block_k is 48"),
        ({"num_warps": 16}, "num_warps is 16"),
        ({"num_stages": 0}, "num_stages is 0"),
        ({"head_group": 0}, "head_group is 0"),
        ({"num_warps": 8}, "block_q / num_warps is 8"),
        ({"num_stages": 3, "blocks_per_sm": 1}, "shared memory"),
        ({"block_q": 128, "block_k": 128, "num_stages": 1}, "registers"),
    ],
)
def test_configs_that_cannot_run_say_why(changes, reason):
    config = dataclasses.replace(ForwardSm80Config(64, 64, 4, 1, 1), **changes)
    reasons = OnDevice().infeasible_reasons(PROBLEM, config)
    assert any(reason in text for text in reasons), reasons


def test_the_search_space_has_every_field_and_feasible_points():
    space = OnDevice().search_space(PROBLEM)
    assert set(space) == {field.name for field in dataclasses.fields(ForwardSm80Config)}
    points = [
        dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())
    ]
    feasible = [
        point
        for point in points
        if not OnDevice().infeasible_reasons(PROBLEM, ForwardSm80Config(**point))
    ]
    assert OnDevice().default_config(PROBLEM).to_dict() in feasible
    assert len(feasible) < len(points)


def test_a_stored_config_is_rebuilt_or_refused():
    stored = ForwardSm80Config(128, 32, 8, 2, 1, 8).to_dict()
    assert kernel("cupy_forward_sm80").config_from_dict(stored) == ForwardSm80Config(
        128, 32, 8, 2, 1, 8
    )
    with pytest.raises(ConfigError, match="fields"):
        kernel("cupy_forward_sm80").config_from_dict({"block_q": 64})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 257}, "head_dim is 257"),
        ({"dtype": "float64"}, "float64"),
        ({"features": frozenset({"kv_lengths"})}, "kv_lengths"),
        ({"seqlen_k": 2**31 - 1}, "lengths must be at most"),
        ({"device_type": "cpu"}, "CUDA devices"),
    ],
)
def test_problems_it_cannot_do_are_refused(changes, reason):
    assert OnDevice().unsupported_reasons(PROBLEM) == []
    reasons = OnDevice().unsupported_reasons(dataclasses.replace(PROBLEM, **changes))
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_source_files_exist():
    for path in OnDevice().source_files():
        with open(path, encoding="utf-8") as file:
            assert file.read()


def test_the_argument_has_wide_fields_first():
    names, packing = layout()
    kinds = packing.format.strip("=x")
    wide = sum(kind in "Qq" for kind in kinds)
    assert len(names) == len(kinds)
    assert set(kinds[:wide]) <= set("Qq")  # else C would pad between fields
    assert not set(kinds[wide:]) & set("Qq")
    assert len(pack(dict.fromkeys(names, 0))) == packing.size
