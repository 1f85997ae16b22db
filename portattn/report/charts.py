"""Charts as SVG, drawn here: no script, nothing loaded, colours from the page's style sheet."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from portattn.report.text import duration, fields

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.report.records import Attempt, Best, Course

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 22, 34
# More lines than these are a grey plane, and a large page.
MAX_LINES = 200
MAX_AXES = 12
_MAX_LABEL = 18


def _svg(width: int, height: int, label: str, body: Sequence[str], kind: str) -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(body)}</svg>'
    )


def _label(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


class _LogScale:
    """Times on a logarithmic axis, with room at both ends.

    Args:
        values: those to show; positive.
        start, end: where the smallest and the largest go.
    """

    def __init__(self, values: Sequence[int], start: float, end: float) -> None:
        self.low, self.high = min(values) * 0.96, max(values) * 1.04
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self, count: int = 4) -> list[float]:
        """Values at equal distances."""
        step = math.log(self.high / self.low) / (count + 1)
        return [self.low * math.exp(step * index) for index in range(1, count + 1)]


def convergence(course: Course) -> str:
    """Each attempt's time in the order of trying, the best so far, the default, and failures."""
    timed = [one.median_ns for one in course.attempts if one.median_ns is not None]
    if not timed:
        return ""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    scale = _LogScale(timed, bottom, _TOP + 14)
    width = (right - _LEFT) / max(len(course.attempts), 1)
    body = [_line(_LEFT, bottom, right, bottom, "axis")]
    for value in scale.ticks():
        body.append(_line(_LEFT, scale(value), right, scale(value), "grid"))
        body.append(_label(_LEFT - 6, scale(value) + 4, duration(round(value)), "end"))
    if course.default_ns is not None:
        y = scale(course.default_ns)
        body.append(_line(_LEFT, y, right, y, "default"))
        body.append(_label(right, y - 4, "default", "end", "note"))
    best: int | None = None
    path = []
    for index, one in enumerate(course.attempts):
        x = _LEFT + (index + 0.5) * width
        tip = f"<title>{escape(f'{index + 1}: {_said(one)}')}</title>"
        if one.median_ns is None:
            body.append(f'<path class="fail" d="M{x:.1f} {_TOP - 8}v8">{tip}</path>')
            continue
        y = scale(one.median_ns)
        body.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3">{tip}</circle>')
        if best is None or one.median_ns < best:
            path.append(f"M{x:.1f} {y:.1f}" if best is None else f"H{x:.1f}V{y:.1f}")
            best = one.median_ns
    path.append(f"H{right}")
    body.append(f'<path class="best" d="{"".join(path)}"/>')
    steps = sorted({1, max(len(course.attempts) // 2, 1), len(course.attempts)})
    for number in steps:
        x = _LEFT + (number - 0.5) * width
        body.append(_label(x, bottom + 16, str(number)))
    body.append(_label((_LEFT + right) / 2, _HEIGHT - 4, "configs tried", kind="note"))
    label = f"Times of {len(course.attempts)} configs of {course.kernel} in the order of trying"
    return _svg(_WIDTH, _HEIGHT, label, body, "convergence")


def _said(one: Attempt) -> str:
    what = one.status if one.median_ns is None else duration(one.median_ns)
    return f"{what}; {fields(one.params)}"[:400]


def _axes(attempts: Sequence[Attempt]) -> dict[str, list[int | bool | str]]:
    """Of each field that varies its values in order."""
    values: dict[str, dict[int | bool | str, None]] = {}
    for one in attempts:
        for name, value in one.params.items():
            values.setdefault(name, {})[value] = None
    ordered = {
        name: sorted(found, key=lambda value: (isinstance(value, str), value))
        for name, found in values.items()
        if len(found) > 1
    }
    return dict(list(ordered.items())[:MAX_AXES])


def _shown(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Slowest first, so that the best lies on top; the best and an even choice of the others."""
    timed = sorted(
        (one for one in attempts if one.median_ns is not None), key=lambda one: one.median_ns or 0
    )
    if len(timed) > MAX_LINES:
        half = MAX_LINES // 2
        others = timed[half:]
        timed = timed[:half] + others[:: -(-len(others) // half)]
    return timed[::-1]


def parallel(course: Course) -> str:
    """One line a config through the values of its fields to its time; the best stands out."""
    lines = _shown(course.attempts)
    axes = _axes(lines)
    if len(lines) < 2 or not axes:
        return ""
    top, bottom = _TOP + 14, _HEIGHT - 18
    places = [
        _LEFT - 24 + index * (_WIDTH - _LEFT - 44) / len(axes) for index in range(len(axes) + 1)
    ]
    times = [one.median_ns for one in lines if one.median_ns is not None]
    scale = _LogScale(times, bottom, top)
    heights = {
        name: {value: _step(index, len(found), top, bottom) for index, value in enumerate(found)}
        for name, found in axes.items()
    }
    body = []
    for index, one in enumerate(lines):
        time_ns = one.median_ns or times[0]
        points = [
            (x, heights[name].get(one.params.get(name, ""), bottom))
            for x, name in zip(places, axes, strict=False)
        ]
        points.append((places[-1], scale(time_ns)))
        rank = index / max(len(lines) - 1, 1)
        kind = "line top" if index == len(lines) - 1 else "line"
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        body.append(
            f'<path class="{kind}" stroke-opacity="{0.08 + 0.42 * rank:.2f}" d="M{path}">'
            f"<title>{escape(_said(one))}</title></path>"
        )
    for x, name in zip(places, axes, strict=False):
        body += _axis(x, name, heights[name], top, bottom)
    body.append(_line(places[-1], top - 4, places[-1], bottom + 4, "axis"))
    body.append(_label(places[-1], top - 12, "time", kind="name"))
    for value in (min(times), max(times)):
        body.append(_label(places[-1] + 6, scale(value) + 4, duration(value), "start", "value"))
    label = f"Fields and times of {len(lines)} configs of {course.kernel}"
    return _svg(_WIDTH + 44, _HEIGHT, label, body, "parallel")


def _step(index: int, count: int, top: float, bottom: float) -> float:
    return bottom - index * (bottom - top) / max(count - 1, 1)


def _axis(
    x: float, name: str, heights: dict[int | bool | str, float], top: float, bottom: float
) -> list[str]:
    """One field's axis, with at most eight of its values."""
    found = [
        _line(x, top - 4, x, bottom + 4, "axis"),
        _label(x, top - 12, name[:_MAX_LABEL], kind="name"),
    ]
    every = -(-len(heights) // 8)
    for value, y in list(heights.items())[::every]:
        found.append(_label(x + 4, y + 4, str(value)[:_MAX_LABEL], "start", "value"))
    return found


def gain_bar(best: Best, most: float) -> str:
    """The gain as a bar from 1, with its interval.

    Args:
        best: of which kernel.
        most: the gain that fills the width.
    """
    width, height = 120, 16
    low, high = best.gain_interval

    def at(gain: float) -> float:
        return min(max((gain - 1) / max(most - 1, 0.05), 0.0), 1.0) * (width - 8) + 2

    length = max(at(best.gain) - 2, 1)
    body = [
        f'<rect class="bar" x="2" y="4" width="{length:.1f}" height="8" rx="2"/>',
        _line(at(low), height / 2, at(high), height / 2, "whisker"),
        *(_line(at(end), 5, at(end), 11, "whisker") for end in (low, high)),
    ]
    label = f"{best.gain:.2f} times the default, 95 % interval {low:.2f} to {high:.2f}"
    return _svg(width, height, label, body, "gain")
