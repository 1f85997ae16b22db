"""Content hashes of mask data: runs are hashed as runs."""

import pytest
import torch

from portattn import masks

LENGTH = 1000


def segments(ids):
    return masks.Segments(torch.tensor(ids, dtype=torch.int32))


@pytest.mark.parametrize(
    "ids",
    [
        [0] * LENGTH,
        [0] * 400 + [1] * 600,
        [0] * 401 + [1] * 599,
        [0] * 400 + [2] * 600,
        [5] * LENGTH,
        [0] * 400 + [1] * 600 + [1],
        list(range(LENGTH)),
        [0, *range(LENGTH - 1)],
        [0, 1] * (LENGTH // 2),
        [],
        [3],
    ],
)
def test_masks_are_equal_where_their_ids_are(ids):
    assert segments(ids) == segments(list(ids))
    others = [[0] * (LENGTH // 2) + [1] * (LENGTH // 2), [1] * LENGTH, [*ids, 7]]
    if ids:
        others += [[*ids[:-1], ids[-1] + 1], [ids[0] - 1, *ids[1:]], ids[:-1]]
    for other in others:
        assert segments(ids) != segments(other)
