"""Pictures of a mask, as text and as PNG, for any length.

A picture is a grid of cells, queries downwards and keys to the right. Small masks are counted
exactly. Large ones are sampled: in each cell a fixed number of query and of key positions, the
cell's first one and others drawn at random with a fixed seed (evenly spaced ones would mistake a
strided mask for a full one), and every pair of them is tested. So a picture takes about four
million tests however long the mask is, and a feature much thinner than a cell may be missing or
drawn too strong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from portattn.errors import MaskError, PortattnError
from portattn.masks.tensors import check_int

if TYPE_CHECKING:
    from pathlib import Path

    from portattn.masks.base import MaskBase

_MAX_TESTS = 2**22
_SHADES = "·░▒▓█"  # nothing, up to a third, up to two thirds, less than all, all
_MAX_TITLE = 160


def show(
    mask: MaskBase, seqlen_q: int, seqlen_k: int, offset: int, *, width: int, b: int, h: int
) -> str:
    """The mask as text: one line for each row of cells, one character for each cell.

    Masks up to ``width`` long show every pair. Longer ones are cut into cells twice as high as
    wide (which looks square in a terminal), shaded by the share of pairs kept: ``·`` none, ``░▒▓``
    some, ``█`` all; see the module's docstring for what is sampled.

    Args:
        mask: the mask.
        seqlen_q: number of query rows.
        seqlen_k: number of keys.
        offset: key position of query row 0.
        width: characters in a line at most.
        b: batch.
        h: query head.
    """
    check_int("width", width, 1, 2**16)
    cell_k = max(-(-max(seqlen_q, seqlen_k) // width), 1)
    cell_q = 1 if cell_k == 1 else 2 * cell_k
    title = f"{_title(mask)}\n{seqlen_q} queries at positions {offset}.., {seqlen_k} keys"
    if cell_k > 1:
        title += f"; a character is {cell_q} queries x {cell_k} keys"
    share, sampled = coverage(mask, seqlen_q, seqlen_k, offset, (cell_q, cell_k), b, h)
    if sampled:
        title += ", sampled"
    shade = np.where(share > 0, np.clip(np.ceil(share * 3), 1, 3), 0).astype(np.int64)
    shade[share == 1] = 4
    return "\n".join([title, *("".join(_SHADES[value] for value in row) for row in shade)])


def plot(
    mask: MaskBase,
    path: str | Path,
    seqlen_q: int,
    seqlen_k: int,
    offset: int,
    *,
    pixels: int,
    b: int,
    h: int,
) -> None:
    """Write the mask as a PNG of at most ``pixels`` cells a side, darker where more is kept.

    Args:
        mask: the mask.
        path: the file to write.
        seqlen_q: number of query rows.
        seqlen_k: number of keys.
        offset: key position of query row 0.
        pixels: cells a side at most.
        b: batch.
        h: query head.

    Raises:
        PortattnError: matplotlib is not installed.
        MaskError: a length of 0, which has no picture.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PortattnError(
            f"plot needs matplotlib ({error}): install portattn[plot], or use show() for text"
        ) from error
    check_int("pixels", pixels, 1, 4096)
    if seqlen_q == 0 or seqlen_k == 0:
        raise MaskError(
            f"a plot of {seqlen_q} queries and {seqlen_k} keys is empty; pass lengths >= 1"
        )
    cell = max(-(-max(seqlen_q, seqlen_k) // pixels), 1)
    share, sampled = coverage(mask, seqlen_q, seqlen_k, offset, (cell, cell), b, h)
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    extent = (0, seqlen_k, offset + seqlen_q, offset)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    axes.set_title(_title(mask), fontsize=9, wrap=True)
    note = f" (a cell is {cell} x {cell}{', sampled' if sampled else ''})" if cell > 1 else ""
    axes.set_xlabel(f"key position{note}")
    axes.set_ylabel("query position")
    figure.savefig(path, format="png", dpi=120)


def coverage(
    mask: MaskBase,
    seqlen_q: int,
    seqlen_k: int,
    offset: int,
    cell: tuple[int, int],
    b: int,
    h: int,
) -> tuple[npt.NDArray[np.float64], bool]:
    """The share of pairs kept in each cell, and whether it was sampled.

    Args:
        mask: the mask.
        seqlen_q: number of query rows.
        seqlen_k: number of keys.
        offset: key position of query row 0.
        cell: (queries, keys) of a cell.
        b: batch.
        h: query head.

    Returns:
        float64 [ceil(seqlen_q / cell[0]), ceil(seqlen_k / cell[1])] in [0, 1]; True if sampled.
    """
    sampled = seqlen_q * seqlen_k > _MAX_TESTS
    shape = (-(-seqlen_q // cell[0]), -(-seqlen_k // cell[1]))
    tests_a_cell = _MAX_TESTS // max(shape[0] * shape[1], 1)
    samples = max(int(tests_a_cell**0.5), 2) if sampled else max(cell)
    rng = np.random.default_rng(0)
    keys, starts = _positions(seqlen_k, cell[1], samples, rng)
    counts = np.diff(np.append(starts, keys.size))
    share = np.zeros(shape)
    # One row of cells at a time bounds the memory of tests and of drawn random blocks.
    for row in range(shape[0]):
        first = row * cell[0]
        rows, _ = _positions(min(cell[0], seqlen_q - first), cell[0], samples, rng)
        if keys.size:
            kept = mask.keeps(
                (offset + first + rows)[:, None], keys[None, :], seqlen_k=seqlen_k, b=b, h=h
            )
            share[row] = np.add.reduceat(kept.sum(axis=0), starts) / (counts * rows.size)
    return share, sampled


def _positions(
    length: int, cell: int, samples: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions to test in [0, length), cell by cell, and where each cell starts among them."""
    if samples >= cell:
        return np.arange(length), np.arange(0, length, cell)
    picked = []
    for start in range(0, length, cell):
        stop = min(start + cell, length)
        rest = rng.integers(start, stop, samples - 1)
        picked.append(np.concatenate([[start], np.sort(rest)]))
    positions = np.concatenate(picked) if picked else np.zeros(0, np.int64)
    return positions.astype(np.int64), np.arange(0, positions.size, samples)


def _title(mask: MaskBase) -> str:
    text = str(mask)
    return text if len(text) <= _MAX_TITLE else text[: _MAX_TITLE - 3] + "..."
