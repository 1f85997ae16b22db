"""Pictures: exact when small, sampled when large."""

import time

import numpy as np
import pytest

from portattn import masks
from portattn.errors import MaskError, PortattnError
from portattn.masks.picture import coverage


def test_small_masks_show_every_pair():
    lines = masks.causal().show(4, 4).splitlines()
    assert lines[0] == "Band(None, 0)"
    assert "4 queries at positions 0.., 4 keys" in lines[1]
    assert lines[2:] == ["█···", "██··", "███·", "████"]
    assert masks.causal().show(1, 3, "end").splitlines()[-1] == "███"
    assert masks.per_head([masks.All(), ~masks.All()]).show(1, 3, h=1).splitlines()[-1] == "···"


def test_cells_are_shaded_by_what_they_keep():
    lines = masks.KeyRange(0, 12).show(64, 64, width=8).splitlines()
    assert "a character is 16 queries x 8 keys" in lines[1]
    assert lines[2:] == ["█▒······"] * 4  # 4 of 8 keys: between one and two thirds
    assert masks.KeyRange(0, 9).show(64, 64, width=8).splitlines()[-1] == "█░······"


def test_coverage_is_exact_below_the_limit():
    mask = masks.longformer(20, 3)
    share, sampled = coverage(mask, 100, 70, 5, (16, 32), 0, 0)
    dense = mask.to_dense(100, 70, 5).numpy()
    wanted = [
        [dense[r : r + 16, c : c + 32].mean() for c in (0, 32, 64)] for r in range(0, 100, 16)
    ]
    assert not sampled
    np.testing.assert_allclose(share, wanted)


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        masks.sparse_transformer_strided(1024),
        masks.bigbird(),
        masks.RandomBlocks(1, 3, 0) | masks.local(4096, 0),
        masks.longformer(512, 64),
    ],
    ids=str,
)
def test_a_million_tokens_are_drawn_from_samples(mask):
    start = time.perf_counter()
    text = mask.show(2**20, 2**20)
    assert time.perf_counter() - start < 10
    lines = text.splitlines()
    assert lines[1].endswith("sampled")
    assert [len(line) for line in lines[2:]] == [64] * 32
    assert all(
        lines[2 + n][2 * n] != "·" for n in range(32)
    )  # the diagonal is kept by all of them


def test_a_sampled_stride_is_not_taken_for_full():
    share, sampled = coverage(masks.DiffModulo(128, 0, 1), 2**20, 2**20, 0, (2**15, 2**14), 0, 0)
    assert sampled
    assert share.max() < 0.1
    assert share.mean() == pytest.approx(1 / 128, rel=0.2)


def test_plot_writes_a_png(tmp_path):
    path = tmp_path / "mask.png"
    masks.longformer(64, 8).plot(path, 300, 500, "end", pixels=100)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(PortattnError, match=r"portattn\[plot\]"):
        masks.causal().plot(tmp_path / "mask.png", 8, 8)


def test_empty_and_wrong_sizes(tmp_path):
    assert len(masks.causal().show(0, 0).splitlines()) == 2
    assert "0 keys" in masks.causal().show(2, 0, 0)
    with pytest.raises(MaskError, match="is empty"):
        masks.causal().plot(tmp_path / "mask.png", 0, 4, 0)
    with pytest.raises(MaskError, match="width is 0"):
        masks.causal().show(4, 4, width=0)
    with pytest.raises(MaskError, match="pixels is 9999"):
        masks.causal().plot(tmp_path / "mask.png", 4, 4, pixels=9999)
