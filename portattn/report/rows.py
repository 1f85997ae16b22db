"""Rows of the database as records; one that makes no sense makes none."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from portattn.report.records import Attempt, Best, Device
from portattn.tuning_db.key import ProblemKey
from portattn.tuning_db.snapshot import key_from_values, parse_params

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_T = TypeVar("_T")

TEXT_CHARS = 2048
KEY_COLUMNS = tuple(field.name for field in dataclasses.fields(ProblemKey))
CONFIRMED = ("confirm_median_ns", "confirm_default_ns")


def valid(make: Callable[[Mapping[str, Any]], _T], row: Mapping[str, Any]) -> _T | None:
    """What a row makes, or None if it makes no sense."""
    try:
        return make(row)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def text_of(row: Mapping[str, Any], name: str) -> str:
    """A text column, cut if it is long."""
    value = row[name]
    if type(value) is not str:
        raise ValueError(f"{name} is no text")
    return value[:TEXT_CHARS]


def number_of(row: Mapping[str, Any], name: str, low: int = 0) -> int:
    """An integer column within bounds."""
    value = row[name]
    if type(value) is not int or not low <= value < 2**62:
        raise ValueError(f"{name} is no number that may be there")
    return value


def device_of(row: Mapping[str, Any]) -> Device:
    """A row of table ``device``, with how many problems and measurements it has."""
    return Device(
        fingerprint=text_of(row, "fp_sha256"),
        name=text_of(row, "name"),
        family=text_of(row, "family"),
        vendor=text_of(row, "vendor"),
        arch=text_of(row, "arch"),
        units=number_of(row, "sm_count") or number_of(row, "cores"),
        threads=number_of(row, "threads_used"),
        memory_bytes=number_of(row, "mem_bytes"),
        problems=number_of(row, "problems"),
        measurements=number_of(row, "measurements"),
    )


def label_of(row: Mapping[str, Any]) -> str:
    """What a bucket is called, from its columns, each named ``key_...``."""
    return key_from_values([row[f"key_{name}"] for name in KEY_COLUMNS]).label[:TEXT_CHARS]


def best_of(row: Mapping[str, Any]) -> Best:
    """A row of table ``best`` with its config."""
    confirmed = [number_of(row, name, 1) if row[name] is not None else None for name in CONFIRMED]
    return Best(
        kernel=text_of(row, "kernel_name"),
        backend=text_of(row, "backend"),
        policy=text_of(row, "policy"),
        toolchain=text_of(row, "toolchain_class"),
        params=parse_params(row["params_json"]),
        median_ns=number_of(row, "median_ns", 1),
        default_ns=number_of(row, "default_ns", 1),
        low_ns=number_of(row, "ci95_lo"),
        high_ns=number_of(row, "ci95_hi"),
        confirmed_ns=confirmed[0],
        confirmed_default_ns=confirmed[1],
        source=text_of(row, "source"),
        updated_us=number_of(row, "updated_us"),
    )


def attempt_of(row: Mapping[str, Any]) -> Attempt:
    """A row of table ``measurement`` with its config."""
    status = text_of(row, "status")
    return Attempt(
        params=parse_params(row["params_json"]),
        status=status,
        median_ns=number_of(row, "median_ns", 1) if status == "ok" else None,
        error=text_of(row, "error_text"),
    )
