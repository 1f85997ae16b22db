"""The mask's way to its plan: sizes, q_offset and density."""

import pytest
import torch

from portattn import masks
from portattn.errors import MaskError
from tests.presets import PRESETS


@pytest.mark.parametrize("case", PRESETS, ids=lambda case: case.name)
def test_density_is_the_share_of_kept_pairs(case):
    for sizes in [(200, 200, None), (33, 130, "end"), (90, 47, 3)]:
        dense = [
            case.mask.to_dense(*sizes, b=b, h=h)
            for b in range(case.batch)
            for h in range(case.num_heads)
        ]
        wanted = float(torch.stack(dense).double().mean())
        assert case.mask.density(*sizes) == pytest.approx(wanted, abs=1e-12)


def test_plan_decodes_to_the_mask():
    mask = masks.longformer(32, 3) & ~masks.KeySet([50])
    plan = mask.plan(40, 200, "end", block=(16, 32), batch=2, num_heads=3)
    assert torch.equal(torch.as_tensor(plan.to_dense(b=1, h=2)), mask.to_dense(40, 200, "end"))
    assert mask.plan(40, 200, 160, block=(16, 32), batch=2, num_heads=3) is plan


def test_plan_takes_the_masks_own_batch_and_heads():
    mask = masks.per_head([masks.causal(), masks.All()]) & masks.padding([10, 3, 0])
    plan = mask.plan(16, 16)
    for b in range(3):
        for h in range(2):
            assert torch.equal(
                torch.as_tensor(plan.to_dense(b=b, h=h)), mask.to_dense(16, 16, b=b, h=h)
            )


def test_a_plan_that_cannot_be_is_named():
    with pytest.raises(MaskError, match="q_offset is None"):
        masks.causal().plan(3, 9)
    with pytest.raises(MaskError):
        masks.documents([0, 4, 8]).plan(9, 9)
    with pytest.raises(MaskError):
        masks.padding([1, 2]).plan(9, 9, batch=3)
