"""The host side of the Hopper forward: tensor maps, arguments, variants."""

import dataclasses
import itertools

import pytest
import torch

from portattn import masks
from portattn.backends import registry
from portattn.backends.triton import hopper_config, hopper_launch, hopper_maps
from portattn.backends.triton.aot import example_inputs
from portattn.backends.triton.hopper_kernel import RUNTIME_PARAMETERS, hopper_forward
from portattn.backends.triton.hopper_variant import pass_of
from portattn.backends.triton.limits import limits_of
from portattn.plan import plan_mask
from portattn.problem import AttentionProblem

NAMES = [parameter.name for parameter in hopper_forward.params]
PROBLEM = AttentionProblem(
    "cuda", "bfloat16", 1, 4, 2, 300, 300, 64, 64, (), 0, frozenset({"lse"})
)  # fmt: skip


def rows_of(descriptor, batch, head, residue):
    """Every row of a map's residue that TMA can touch, as a tensor [rows, width]."""
    whole = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    return whole[batch, head, residue]


@pytest.mark.parametrize("length", [1, 5, 8, 12, 13, 300])
@pytest.mark.parametrize("step", [1, 2, 5, 13])
@pytest.mark.parametrize("order", ["bhsd", "bshd"])
def test_maps_hold_the_rows_of_each_residue_and_no_others(length, step, order):
    tensor = torch.arange(2 * 3 * length * 40).view(2, 3, length, 40).to(torch.int16)
    if order == "bshd":
        tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    tensor = tensor.view(torch.bfloat16)
    long, short = (hopper_maps.describe(step, is_short, 64, 64, tensor) for is_short in (0, 1))
    count = hopper_maps.long_residues(length, step)
    for batch, head, residue in itertools.product(range(2), range(3), range(min(step, length))):
        used = long if residue < count else short
        found = rows_of(used, batch, head, residue)
        assert torch.equal(
            found.view(torch.int16), tensor[batch, head, residue::step].view(torch.int16)
        )
    for used in (long, short):
        last = sum(
            (size - 1) * stride for size, stride in zip(used.shape, used.strides, strict=True)
        )
        assert last < tensor.numel()
        assert all(stride % 8 == 0 for stride in used.strides[:-1])


def test_tensors_that_tma_cannot_read_are_copied():
    tensor = torch.randn(2, 3, 50, 64).to(torch.bfloat16)
    for fine in (tensor, tensor.transpose(1, 2), tensor[..., :40], tensor[:, :, ::3]):
        assert hopper_maps.readable(fine) is fine
    narrow = torch.randn(2, 3, 50, 36).to(torch.bfloat16)
    for odd in (tensor[..., 1:], tensor[:1].expand(2, -1, -1, -1), narrow, narrow.mT):
        copy = hopper_maps.readable(odd)
        assert hopper_maps.is_readable(copy)
        assert torch.equal(copy, odd)


class Recorder:
    """Stands for RepeatedLaunch: keeps what it was made of and called with."""

    made: "list[Recorder]"
    direct = None

    def __init__(self, kernel, grid, arguments, moving, options, device, most_blocks):
        assert 0 < grid <= most_blocks
        self.kernel, self.grid, self.options = kernel, grid, options
        self.arguments = dict(zip(NAMES, arguments, strict=True))
        self.moving = {NAMES[position]: how for position, how in moving.items()}
        Recorder.made.append(self)

    def __call__(self, tensors):
        self.tensors = dict(zip(self.moving, tensors, strict=True))


@pytest.fixture
def recorded(monkeypatch):
    """Launches of a call, without a GPU."""
    monkeypatch.setattr(hopper_launch, "RepeatedLaunch", Recorder)
    monkeypatch.setattr(hopper_launch, "device_limits", lambda _: limits_of("sm_90"))

    def launches(problem, mask=None, inputs=None, **changes):
        Recorder.made = []
        inputs = example_inputs(problem, "cpu") if inputs is None else inputs
        program = () if mask is None else tuple(mask.program)
        config = hopper_config.default_for(dataclasses.replace(problem, program=program))
        config = dataclasses.replace(config, **changes)
        plan = plan_mask(
            mask, batch=problem.batch, num_heads=problem.num_heads, seqlen_q=problem.seqlen_q,
            seqlen_k=problem.seqlen_k, q_offset=0, block_q=config.block_q, block_k=config.block_k,
        )  # fmt: skip
        schedule = plan.schedule(
            batch=problem.batch, num_heads=problem.num_heads, workers=132, head_dim_v=64,
            min_piece=config.min_piece,
        )  # fmt: skip
        hopper_launch.HopperCall(inputs, plan, schedule, config).run(inputs)
        return Recorder.made, plan, schedule

    return launches


def test_arguments_of_a_dense_call(recorded):
    (launch,), _, schedule = recorded(PROBLEM, block_q=192, registers=160)
    arguments = launch.arguments
    assert launch.grid == int(schedule.items_per_pass[0]) * 4
    assert launch.options["maxnreg"] == 128  # three consumers
    assert set(launch.moving) == {
        "q_desc", "k_desc", "v_desc", "out_desc", "out_ptr", "lse_ptr", "counters_ptr"
    }  # fmt: skip
    assert launch.tensors["out_ptr"] is launch.tensors["out_desc"]
    assert arguments["SHORT_WIDTH"] == 0
    assert (arguments["seqlen_k"], arguments["group_size"], arguments["num_bh"]) == (300, 2, 4)
    assert (arguments["STEPPED"], arguments["PIECES"], arguments["SCALED"]) == (False,) * 3
    assert launch.moving["q_desc"](launch.tensors["q_desc"]).block_shape == [1, 1, 1, 64, 64]
    assert launch.moving["k_desc"](launch.tensors["k_desc"]).block_shape == [1, 1, 1, 128, 64]
    for name in RUNTIME_PARAMETERS:
        assert name in NAMES


def test_programs_fill_the_device(recorded):
    problem = dataclasses.replace(PROBLEM, seqlen_q=16384, num_heads=16)
    (launch,), _, schedule = recorded(problem)
    assert launch.grid == 132 < int(schedule.items_per_pass[0]) * 16
    (launch,), _, schedule = recorded(dataclasses.replace(PROBLEM, seqlen_q=64))
    assert launch.grid == int(schedule.items_per_pass[0]) * 4


def test_a_strided_mask_runs_in_two_passes(recorded):
    problem = dataclasses.replace(PROBLEM, seqlen_q=1000, seqlen_k=1000)
    launches, plan, _ = recorded(problem, masks.sparse_transformer_strided(24))
    assert [int(step) for step in plan.pass_steps] == [1, 24]
    first, second = launches
    flags = [
        [launch.arguments[name] for name in ("STEPPED", "FIRST", "LAST")]
        for launch in (first, second)
    ]
    assert flags == [[False, True, False], [True, False, True]]
    # 1000 = 41 * 24 + 16
    assert second.arguments["q_residues"] == second.arguments["k_residues"] == 16
    assert {"q_short", "k_long", "k_short", "v_long", "v_short", "out_short"} < set(second.moving)
    assert first.tensors["running_out_ptr"] is second.tensors["running_out_ptr"]
    assert second.tensors["k_long"] is second.tensors["k_desc"]


def test_cut_rows_have_a_counter_for_each_consumer(recorded):
    problem = dataclasses.replace(PROBLEM, num_heads=1, num_kv_heads=1, seqlen_k=20000)
    (launch,), _, schedule = recorded(problem, block_q=192, registers=160)
    assert launch.arguments["PIECES"]
    assert launch.tensors["counters_ptr"].numel() >= 3 * schedule.num_counters
    assert launch.tensors["slots_out_ptr"].numel() == schedule.num_slots * 192 * 64


def test_an_output_that_tma_cannot_write_is_copied_out(recorded):
    problem = dataclasses.replace(PROBLEM, head_dim_v=36)
    inputs = example_inputs(problem, "cpu")
    (launch,), _, _ = recorded(problem, inputs=inputs)
    written = launch.tensors["out_desc"]
    assert written is launch.tensors["out_ptr"]
    assert written is not inputs.output
    assert hopper_maps.is_readable(written)


def test_id_tiles_are_seen(recorded):
    mask = masks.documents(torch.arange(0, 301, 50))  # shorter than a tile
    inputs = dataclasses.replace(example_inputs(PROBLEM, "cpu"), mask=mask)
    (launch,), plan, schedule = recorded(PROBLEM, mask, inputs)
    assert launch.arguments["IDS"]
    assert launch.arguments["q_ids_ptr"] is not None
    assert launch.arguments["SHORT_WIDTH"] == 64  # of what follows a document's last rows
    assert not launch.arguments["STEPPED"]
    assert pass_of(plan, schedule, 0).ids


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.longformer(64, 8)])
def test_new_lengths_have_no_new_variants(recorded, mask):
    found = set()
    for seqlen, batch in ((1000, 1), (1024, 1), (1337, 3), (4096, 2)):
        problem = dataclasses.replace(PROBLEM, seqlen_q=seqlen, seqlen_k=seqlen, batch=batch)
        # Long rows on few workers are cut into pieces, which is a variant of its own.
        launches, _, _ = recorded(problem, mask, min_piece=1000)
        found.add(
            tuple(
                tuple(value for name, value in launch.arguments.items() if name.isupper())
                + tuple(sorted(launch.moving))
                for launch in launches
            )
        )
    assert len(found) == 1, found


def test_calls_that_copy_different_tensors_are_kept_apart():
    """Their tensor maps have other strides, though all else about them is equal."""

    def inputs(misaligned):
        made = {}
        for name in ("query", "key", "value"):
            storage = torch.zeros(2 * 64 * 4 * 64 + 1, dtype=torch.float16)
            offset = 1 if name == misaligned else 0
            made[name] = storage[offset : offset + storage.numel() - 1].view(2, 64, 4, 64)
        made = {name: tensor.transpose(1, 2) for name, tensor in made.items()}
        output = torch.zeros(2, 4, 64, 64, dtype=torch.float16)
        problem = dataclasses.replace(PROBLEM, dtype="float16", batch=2, seqlen_q=64, seqlen_k=64)
        return dataclasses.replace(example_inputs(problem), output=output, **made)

    config = hopper_config.TritonForwardHopperConfig()
    kernel = registry.kernel("triton_forward_hopper")
    keys = [
        hopper_launch.hopper_key(kernel, inputs(name), config)
        for name in ("query", "key", "value", "none", "query")
    ]
    assert len(set(keys)) == 4
    assert keys[0] == keys[4]
