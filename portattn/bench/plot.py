"""Results as bars: each row's contenders, as a share of what the device can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from portattn.errors import PortattnError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

_ROW_INCHES, _BAR_INCHES = 0.35, 0.16
_METRICS = {
    "time": ("tflops", "TFLOP/s of kept pairs"),
    "bandwidth": ("tbps", "TB/s of keys and values"),
    "host": ("host_us", "host µs of a call"),
}
_LIMITS = {"time": "matmul_tflops", "bandwidth": "read_tbps"}  # dashed lines


def plot(document: dict[str, Any], path: Path) -> None:
    """Write a PNG with one panel for each kind of figure among the rows.

    Args:
        document: a file of results.
        path: the picture.

    Raises:
        PortattnError: matplotlib is not installed, or no row holds times.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PortattnError(
            f"--plot needs matplotlib ({error}): install portattn[plot], or leave --plot out"
        ) from error
    rows = document["rows"]
    panels = {
        metric: [row for row in rows if row.get("contenders") and _metric(row) == metric]
        for metric in _METRICS
    }
    panels = {metric: found for metric, found in panels.items() if found}
    if not panels:
        raise PortattnError("--plot has no row with times to draw")
    heights = [
        sum(_ROW_INCHES + _BAR_INCHES * len(row["contenders"]) for row in found)
        for found in panels.values()
    ]
    figure = Figure(figsize=(11, sum(heights) + len(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    names = list(dict.fromkeys(name for row in rows for name in row.get("contenders", ())))
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    for panel, (metric, found) in zip(axes, panels.items(), strict=True):
        _draw(panel, metric, found, colours)
        if metric in _LIMITS:
            limit = document["runs"][-1]["limits"][_LIMITS[metric]]
            panel.axvline(limit, color="black", linestyle="--", linewidth=0.8)
    figure.savefig(path, dpi=120)


def _metric(row: dict[str, Any]) -> str:
    return str(row["workload"]["metric"])


def _draw(
    axes: Axes, metric: str, rows: Sequence[dict[str, Any]], colours: dict[str, str]
) -> None:
    """Bars from the top downwards, one group a row; portattn's are solid, peers' hatched."""
    field, label = _METRICS[metric]
    place, ticks = 0.0, []
    for row in rows:
        begin = place
        for name, one in row["contenders"].items():
            axes.barh(
                place, one[field], 0.9, color=colours[name], edgecolor="white",
                hatch=None if one["is_own"] else "///",
                label=None if name in axes.get_legend_handles_labels()[1] else name,
            )  # fmt: skip
            axes.text(one[field], place, f" {one[field]:.3g}", va="center", fontsize=6)
            place += 1
        ticks.append(((begin + place - 1) / 2, row["name"].partition(": ")[2]))
        place += 1.5
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.legend(fontsize=7)
