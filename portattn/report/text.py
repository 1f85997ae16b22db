"""Numbers and configs for people."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portattn.tuning_db.records import Params


def duration(time_ns: int) -> str:
    """A time for people: three digits and a unit."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if time_ns >= size:
            value = time_ns / size
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
    return f"{time_ns} ns"


def fields(params: Params) -> str:
    """A config on one line."""
    return " ".join(f"{name}={value}" for name, value in params.items()) or "(no fields)"


def instant(time_us: int) -> str:
    """A time stamp of the database: UTC, to the minute; "" for none that a calendar has."""
    try:
        moment = datetime.datetime.fromtimestamp(time_us / 1e6, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return ""
    return f"{moment:%Y-%m-%d %H:%M} UTC" if time_us else ""
