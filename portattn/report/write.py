"""The whole database as one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from portattn.report import html
from portattn.report.records import Problem

if TYPE_CHECKING:
    from portattn.report.reader import Reader
    from portattn.report.records import Device

# A course has two charts of about 30 KB; a file that a browser opens at once has not many more.
MAX_COURSES = 300


def report(reader: Reader, *, problem: str = "", kernel: str = "", device: str = "") -> str:
    """Everything, or what matches.

    Args:
        reader: of the database.
        problem: only problems whose label holds this.
        kernel: only kernels whose name holds this.
        device: only devices whose name, family or fingerprint holds this.

    Returns:
        The HTML text: it has its style and script inside and loads nothing.

    Raises:
        TuningError: the database cannot be read.
    """
    sections, cards, left = [], [], MAX_COURSES
    for one in reader.devices():
        if not any(device in text for text in (one.name, one.family, one.fingerprint)):
            continue
        problems = _matching(reader.problems(one.fingerprint), problem, kernel)
        if not problems:
            continue
        cards.append(html.device_card(one, problems, f"#{one.fingerprint}"))
        text, drawn = _section(reader, one, problems, kernel, left)
        sections.append(text)
        left -= drawn
    body = f'<div class="cards">{"".join(cards)}</div>{"".join(sections)}'
    if not cards:
        body = '<p class="card">Nothing is stored here that matches.</p>'
    if left <= 0:
        body += f'<p class="soft">Charts of the first {MAX_COURSES} searches are shown.</p>'
    return html.page(
        "Tuning report",
        body,
        head=f"<style>{html.static('style.css')}</style>",
        crumbs=escape(reader.location.shown),
        script=f"<script>{html.static('page.js')}</script>",
    )


def _matching(problems: list[Problem], problem: str, kernel: str) -> list[Problem]:
    found = (
        Problem(one.key_sha256, one.label, tuple(b for b in one.bests if kernel in b.kernel))
        for one in problems
        if problem in one.label
    )
    return [one for one in found if one.bests]


def _section(
    reader: Reader, device: Device, problems: list[Problem], kernel: str, most: int
) -> tuple[str, int]:
    """One device, and how many searches of it are drawn."""
    table = f"bests-{device.fingerprint}"
    drawn, details = 0, []
    for one in problems:
        if drawn >= most:
            break
        courses = [
            course
            for course in reader.courses(device.fingerprint, one.key_sha256)
            if kernel in course.kernel
        ][: most - drawn]
        drawn += len(courses)
        if courses:
            inside = "".join(map(html.course_section, courses))
            anchor = _anchor(device, one)
            details.append(
                f'<details id="{escape(anchor)}"><summary>{escape(one.label)}</summary>{inside}'
                "</details>"
            )
    text = (
        f'<section class="card" id="{escape(device.fingerprint)}">'
        f'<h2>{escape(device.name)}</h2><div class="soft">{escape(html.facts(device))}</div>'
        + html.search_box(table, "filter problems and kernels")
        + html.bests_table(problems, lambda one: f"#{_anchor(device, one)}", table)
        + f"<h3>How they were found</h3>{''.join(details)}</section>"
    )
    return text, drawn


def _anchor(device: Device, problem: Problem) -> str:
    return f"{device.fingerprint[:16]}-{problem.key_sha256[:16]}"
