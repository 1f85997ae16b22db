"""Plans and schedules on a device: what is copied, once, and what lies where."""

import gc
import weakref

import pytest
import torch

from portattn import masks
from portattn.plan import Plan, to_device
from portattn.plan import device as plan_device

CPU = torch.device("cpu")
# What all see beside the documents keeps tiles on the grid, with ids.
SHORT = masks.documents([0, 20, 64]) | masks.KeyRange(0, 1)


def plan_of(mask, seqlen=64, seqlen_q=None, q_offset=0, block=16):
    return Plan.create(
        mask.program, mask.data, batch=1, num_heads=2, seqlen_q=seqlen_q or seqlen,
        seqlen_k=seqlen, q_offset=q_offset, block_q=block, block_k=block,
    )  # fmt: skip


def schedule_of(plan):
    return plan.schedule(batch=1, num_heads=2, workers=4, head_dim_v=8)


def count_copies(monkeypatch):
    made = []
    original = plan_device._Copy.__init__

    def counted(self, plan, schedule, device):
        original(self, plan, schedule, device)
        made.append(len(set(self.starts.values())))

    monkeypatch.setattr(plan_device._Copy, "__init__", counted)
    return made


def test_plan_and_schedule_go_in_one_copy(monkeypatch):
    copies = count_copies(monkeypatch)
    plan = plan_of(SHORT)
    schedule = schedule_of(plan)
    plan_on, schedule_on = to_device(plan, schedule, CPU)
    assert len(copies) == 1
    assert (plan_on, schedule_on) == (plan.to(CPU), schedule.to("cpu"))
    assert plan_on.buffer is schedule_on.buffer
    for mine, name in ((plan, "tiles"), (plan, "q_ids"), (schedule, "items")):
        array = getattr(mine, name)
        copied = getattr(plan_on if mine is plan else schedule_on, name)
        assert torch.equal(copied, torch.from_numpy(array.copy()))
        assert copied.data_ptr() == (plan_on if mine is plan else schedule_on).address(name)
        assert copied.data_ptr() % 128 == plan_on.buffer.data_ptr() % 128
    # Another schedule of a plan that is there already comes alone.
    other = plan.schedule(batch=1, num_heads=2, workers=99, head_dim_v=8)
    to_device(plan, other, CPU)
    assert len(copies) == 2


def test_unknown_arrays_are_attribute_errors():
    plan = plan_of(masks.causal())
    plan_on, schedule_on = to_device(plan, schedule_of(plan), CPU)
    for holder in (plan, schedule_of(plan), plan_on, schedule_on):
        with pytest.raises(AttributeError):
            holder.no_such_array  # noqa: B018


def test_ids_that_rows_and_keys_share_are_stored_once(monkeypatch):
    copies = count_copies(monkeypatch)
    same = plan_of(SHORT)
    assert (same.q_ids == same.k_ids).all()
    assert same.q_ids.ctypes.data == same.k_ids.ctypes.data
    assert (same.transpose().q_ids == same.k_ids).all()
    on_device = same.to(CPU)
    assert on_device.address("q_ids") == on_device.address("k_ids")
    assert torch.equal(on_device.k_ids, torch.from_numpy(same.k_ids.copy()))
    shifted = plan_of(SHORT, seqlen_q=40, q_offset=24)
    assert shifted.q_ids.shape == (1, 40)
    assert shifted.to(CPU).address("q_ids") != shifted.to(CPU).address("k_ids")
    assert copies[0] < copies[1]
    # Query ids without a partner among the keys, and the other way about.
    ids = torch.tensor([0, 0, 1, 1] * 16), torch.tensor([0, 0, 2, 2] * 16)
    unlike = plan_of(masks.Segments(*ids))
    assert sorted(set(unlike.q_ids.ravel().tolist())) == [-1, 0]
    assert sorted(set(unlike.k_ids.ravel().tolist())) == [-2, 0]


def test_plans_without_id_tiles_have_no_ids():
    plan = plan_of(masks.documents([0, 16, 64]))
    assert plan.num_id_rows == 0
    assert plan.layout_ids.tolist() == [-1]
    assert plan.to_dense().sum() == 16**2 + 48**2


def test_calls_go_with_their_plan():
    plan = plan_of(masks.causal())
    first, second = object(), object()
    assert plan.keep_call("key", first) is first
    assert plan.keep_call("key", second) is first
    for index in range(200):
        plan.keep_call(index, object())
    assert len(plan.calls) <= 64
    gone = weakref.ref(plan)
    to_device(plan, schedule_of(plan), CPU)
    gc.disable()
    try:
        del plan
        assert gone() is None, "nothing that a plan holds may hold the plan"
    finally:
        gc.enable()


def test_nothing_new_goes_to_a_device_during_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    plan = plan_of(masks.causal())
    with pytest.raises(plan_device.MaskError, match=r"CUDA graph .* plan\.to\(device\)"):
        to_device(plan, schedule_of(plan), torch.device("cuda", 0))
