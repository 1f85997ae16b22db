"""Pages as text. Whatever comes from the database goes through `escape`."""

from __future__ import annotations

import importlib.resources
import math
import urllib.parse
from html import escape
from typing import TYPE_CHECKING

from portattn import __version__
from portattn.report import charts
from portattn.report.text import duration, fields, instant

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from portattn.report.records import Attempt, Best, Course, Device, Problem

MAX_REASONS = 20
_REASON_CHARS = 300


def static(name: str) -> str:
    """One of the page's own files: ``"style.css"`` or ``"page.js"``."""
    return (importlib.resources.files(__package__) / "static" / name).read_text(encoding="utf-8")


def page(title: str, body: str, *, head: str, crumbs: str = "", script: str = "") -> str:
    """A whole page.

    Args:
        title: as text.
        body: as HTML.
        head: elements that bring the style sheet.
        crumbs: where this page stands, as HTML.
        script: the element that brings the script.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n{head}\n</head>\n'
        "<body>\n"
        f'<header><p class="crumbs">{crumbs}</p><h1>{escape(title)}</h1></header>\n'
        f"<main>{body}</main>\n<footer>portattn {escape(__version__)}</footer>\n"
        f"{script}</body>\n</html>\n"
    )


def device_path(fingerprint: str) -> str:
    """The page of a device, relative to the first page."""
    return f"devices/{urllib.parse.quote(fingerprint, safe='')}"


def problem_path(fingerprint: str, key_sha256: str) -> str:
    """The page of a problem, relative to the first page."""
    return f"{device_path(fingerprint)}/problems/{urllib.parse.quote(key_sha256, safe='')}"


def mean_gain(problems: Sequence[Problem]) -> float:
    """Geometric mean over problems of the gain of each one's fastest kernel; 1 without any."""
    gains = [problem.bests[0].gain for problem in problems if problem.bests]
    return math.exp(sum(map(math.log, gains)) / len(gains)) if gains else 1.0


def facts(device: Device) -> str:
    """A device on one line."""
    units = "cores" if device.threads else "multiprocessors"
    parts = [device.family, f"{device.units} {units}"]
    if device.threads:
        parts.append(f"{device.threads} threads")
    if device.memory_bytes:
        parts.append(f"{device.memory_bytes / 2**30:.0f} GiB")
    return " · ".join([*parts, f"fingerprint {device.fingerprint[:8]}"])


def device_card(device: Device, problems: Sequence[Problem], link: str) -> str:
    """A device with its figures."""
    figures = (
        (str(len(problems)), "problems"),
        (str(device.measurements), "measurements"),
        (f"{mean_gain(problems):.2f}x", "mean gain"),
    )
    shown = "".join(
        f'<div><b>{escape(value)}</b><span class="soft">{name}</span></div>'
        for value, name in figures
    )
    return (
        f'<section class="card device"><h2><a href="{escape(link)}">{escape(device.name)}</a></h2>'
        f'<div class="soft">{escape(facts(device))}</div><div class="figures">{shown}</div>'
        "</section>"
    )


_HEADINGS = (
    *(("problem", ""), ("kernel", ""), ("default", "number"), ("best", "number")),
    *(("gain", ""), ("config", ""), ("from", "")),
)


def bests_table(
    problems: Sequence[Problem], link: Callable[[Problem], str] | None, name: str = "bests"
) -> str:
    """Every kernel's best config on every problem.

    Args:
        problems: what.
        link: where a problem leads; None for nowhere.
        name: the table's id.
    """
    most = max((best.gain for problem in problems for best in problem.bests), default=1.0)
    rows = [
        _row(problem, best, most, link, is_fastest=index == 0 and len(problem.bests) > 1)
        for problem in problems
        for index, best in enumerate(problem.bests)
    ]
    head = "".join(f'<th data-sort class="{kind}">{text}</th>' for text, kind in _HEADINGS)
    return (
        f'<div class="scroll"><table id="{escape(name)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(
    problem: Problem,
    best: Best,
    most: float,
    link: Callable[[Problem], str] | None,
    *,
    is_fastest: bool,
) -> str:
    label = escape(problem.label)
    if link is not None:
        label = f'<a href="{escape(link(problem))}">{label}</a>'
    low, high = best.gain_interval
    config = "the default" if best.kept_default else fields(best.params)
    confirmed = ""
    if best.confirmed_ns and best.confirmed_default_ns:
        again = best.confirmed_default_ns / best.confirmed_ns
        confirmed = f'<br><span class="soft">{again:.2f}x in a fresh process</span>'
    origin = " · ".join(filter(None, (best.source, best.policy, best.toolchain)))
    cells = (
        f"<td>{label}</td>",
        f'<td class="kernel">{escape(best.kernel)}</td>',
        _time(best.default_ns),
        _time(best.median_ns),
        f'<td class="gain" data-value="{best.gain:.6f}">{charts.gain_bar(best, most)} '
        f'{best.gain:.2f}x<br><span class="soft">{low:.2f} to {high:.2f}</span>{confirmed}</td>',
        f'<td class="config">{escape(config)}</td>',
        f'<td data-value="{best.updated_us}">{escape(origin)}<br>'
        f'<span class="soft">{escape(instant(best.updated_us))}</span></td>',
    )
    return f'<tr class="{"fastest" if is_fastest else ""}">{"".join(cells)}</tr>'


def _time(time_ns: int) -> str:
    return f'<td class="number" data-value="{time_ns}">{escape(duration(time_ns))}</td>'


def search_box(name: str, hint: str) -> str:
    """A field that filters a table, shown where scripts run."""
    return (
        f'<input type="search" hidden data-filter="{escape(name)}" '
        f'placeholder="{escape(hint)}" aria-label="{escape(hint)}">'
    )


def course_section(course: Course) -> str:
    """The course of one search: charts, and what was rejected and why."""
    tried, timed = len(course.attempts), [one for one in course.attempts if one.median_ns]
    said = f"{tried} configs tried, {tried - len(timed)} rejected; {course.policy}"
    if course.left_out:
        said += f"; {course.left_out} more are not shown"
    when = instant(course.started_us)
    parts = [
        f'<section class="course"><h3>{escape(course.kernel)}</h3>',
        f'<div class="soft">{escape(said)}{f"; {escape(when)}" if when else ""}</div>',
        '<div class="charts">',
    ]
    for chart, caption in (
        (charts.convergence(course), "Each config in the order of trying; the line is the best."),
        (charts.parallel(course), "Each config through its fields to its time."),
    ):
        if chart:
            parts.append(f"<figure>{chart}<figcaption>{caption}</figcaption></figure>")
    return "".join([*parts, "</div>", _rejections(course.rejected), "</section>"])


def _rejections(rejected: dict[tuple[str, str], list[Attempt]]) -> str:
    if not rejected:
        return ""
    rows = [
        f'<tr><td class="number">{len(found)}</td><td class="status">{escape(status)}</td>'
        f"<td>{escape(reason[:_REASON_CHARS])}</td>"
        f'<td class="config">{escape(fields(found[0].params))}</td></tr>'
        for (status, reason), found in list(rejected.items())[:MAX_REASONS]
    ]
    more = len(rejected) - len(rows)
    note = f'<div class="soft">and {more} more reasons</div>' if more > 0 else ""
    return (
        '<div class="scroll"><table class="rejected"><thead><tr><th class="number">configs</th>'
        "<th>rejected as</th><th>why</th><th>for example</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )
