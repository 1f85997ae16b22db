"""The pages of `portattn serve`: devices, one device, one problem. Links are relative."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from portattn.report import html

if TYPE_CHECKING:
    from portattn.report.reader import Reader


def _page(title: str, body: str, depth: int, crumbs: str = "") -> str:
    """A page that lies so many folders below the first."""
    up = "../" * depth
    return html.page(
        title,
        body,
        head=f'<link rel="stylesheet" href="{up}static/style.css">',
        crumbs=crumbs,
        script=f'<script src="{up}static/page.js"></script>\n',
    )


def devices(reader: Reader) -> str:
    """The first page."""
    cards = [
        html.device_card(one, reader.problems(one.fingerprint), html.device_path(one.fingerprint))
        for one in reader.devices()
    ]
    if not cards:
        return _page("Devices", '<p class="card">Nothing was tuned yet.</p>', 0)
    return _page("Devices", f'<div class="cards">{"".join(cards)}</div>', 0)


def device(reader: Reader, fingerprint: str) -> str | None:
    """A device's problems and gains; None if nothing is known of it."""
    found = next((one for one in reader.devices() if one.fingerprint == fingerprint), None)
    if found is None:
        return None
    problems = reader.problems(fingerprint)
    prefix = len("devices/")
    table = html.bests_table(
        problems, lambda one: html.problem_path(fingerprint, one.key_sha256)[prefix:]
    )
    body = (
        f'<section class="card"><div class="soft">{escape(html.facts(found))}</div>'
        f"{html.search_box('bests', 'filter problems and kernels')}{table}</section>"
    )
    return _page(found.name, body, 1, '<a href="../">Devices</a>')


def problem(reader: Reader, fingerprint: str, key_sha256: str) -> str | None:
    """A problem's kernels and the course of their searches; None if nothing is known of it."""
    found = next((one for one in reader.devices() if one.fingerprint == fingerprint), None)
    problems = [one for one in reader.problems(fingerprint) if one.key_sha256 == key_sha256]
    courses = reader.courses(fingerprint, key_sha256)
    if found is None or not (problems or courses):
        return None
    title = problems[0].label if problems else "A problem without a best config"
    sections = "".join(html.course_section(course) for course in courses)
    body = f'<section class="card">{html.bests_table(problems, None)}</section>'
    if sections:
        body += f'<section class="card"><h2>How they were found</h2>{sections}</section>'
    name = escape(found.name)
    crumbs = f'<a href="../../../">Devices</a> / <a href="../../{fingerprint}">{name}</a>'
    return _page(title, body, 3, crumbs)
