"""Which stored config runs, on the call path: a dictionary in this process, filled once.

No SQL, no exception.

The ladder, first hit wins; dispatch validates what comes back and has the kernel's default as its
last rung:

* ``exact``: tuned on this device, for this bucket, with this kernel source and toolchain;
* ``stale``: the same, but the kernel's source or toolchain has changed since;
* ``family``: tuned on another device of the same family, for this bucket;
* ``seeds``: shipped with the package for this family and bucket;
* ``nearest``: one of the above for the nearest bucket, at most `key.MAX_DISTANCE` doublings away.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import warnings
from typing import TYPE_CHECKING, NamedTuple

from portattn.tuning_db import misses, seeds, snapshot
from portattn.tuning_db.identity import toolchain_class
from portattn.tuning_db.key import MAX_DISTANCE, bucket
from portattn.tuning_db.location import Location, TuningDatabaseWarning, locate
from portattn.tuning_db.nearest import Group

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from portattn.device import DeviceKey
    from portattn.problem import AttentionProblem
    from portattn.tuning_db.key import ProblemKey
    from portattn.tuning_db.snapshot import StoredConfig

RUNGS = ("exact", "stale", "family", "seeds", "nearest")
_MEMO_ENTRIES = 8192
# Configs tuned as calls of CUDA graphs go first where it says "graph", else those tuned as calls
# one by one; among them, those timed with a cold cache.
POLICY_VARIABLE = "PORTATTN_POLICY"


class Found(NamedTuple):
    """A stored config: its fields, and the rung of the ladder that it stood on.

    No fields mean that the kernel's default was best there: ask the kernel for it.
    """

    params: dict[str, int | bool | str]
    rung: str


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """What this process knows of the database.

    Attributes:
        location: where it is.
        state: as in `snapshot.Snapshot`.
        detail: why, if it is not ``"ok"``.
        rows, seed_rows, invalid_rows: how many were loaded, shipped and skipped.
    """

    location: Location
    state: str
    detail: str
    rows: int
    seed_rows: int
    invalid_rows: int


class _Table:
    """The loaded rows and the answers given so far."""

    def __init__(self, location: Location) -> None:
        read = snapshot.read(location)
        seed_rows, seed_problems = seeds.load_all()
        self.status = Status(
            location, read.state, read.detail, len(read.rows), len(seed_rows), read.invalid_rows
        )
        self.warning = _warning_text(self.status, seed_problems)
        self.counts_misses = read.state == "ok" and misses.are_wanted(location)
        self.policy = os.environ.get(POLICY_VARIABLE, "eager")
        self.rows = (*read.rows, *seed_rows)
        self.groups: dict[tuple[object, ...], Group] = {}
        for row in filter(_is_answer, self.rows):
            group = (row.kernel_name, row.family, *row.key.group)
            self.groups.setdefault(group, Group()).add(row)
        # Answers given, by problem, and by bucket for problems that are new.
        self.found: dict[tuple[str, AttentionProblem, DeviceKey], Found | None] = {}
        self.by_bucket: dict[tuple[str, ProblemKey, DeviceKey], Found | None] = {}


_UNKNOWN = Found({}, "")  # not asked yet
_lock = threading.Lock()
_table: _Table | None = None


def _warning_text(status: Status, seed_problems: Sequence[str]) -> str:
    """What the user must know, or "" if nothing.

    Never having tuned is the normal state of a new machine.
    """
    parts = []
    if status.state not in ("ok", "off") and (status.state != "missing" or status.location.named):
        way_out = {
            "missing": "run `portattn tune` to make it, or unset PORTATTN_DB",
            "unreachable": "start `portattn serve` there, or unset PORTATTN_DB",
            "locked": "another process holds it; start again once that is done",
            "newer": "upgrade portattn, or point PORTATTN_DB at another file",
        }.get(
            status.state,
            "`portattn doctor` says more; move the file away and run `portattn tune` for a new "
            "one",
        )
        parts.append(
            f"tuning database {status.location.shown} is {status.state}: {status.detail}. Default "
            f"configs run; {way_out}"
        )
    if status.invalid_rows:
        parts.append(
            f"{status.invalid_rows} rows of tuning database {status.location.shown} are invalid "
            "and not used; "
            "run `portattn tune` to measure them anew"
        )
    parts += [f"seeds file {problem} is not used; reinstall portattn" for problem in seed_problems]
    return "; ".join(parts)


def _loaded() -> _Table:
    global _table
    if _table is not None:
        return _table
    with _lock:
        if _table is None:
            _table = _Table(locate())
            if _table.warning:
                warnings.warn(_table.warning, TuningDatabaseWarning, stacklevel=3)
        return _table


def reload() -> None:
    """Forget what was loaded.

    The next lookup reads the database that ``PORTATTN_DB`` names then.
    """
    global _table
    with _lock:
        _table = None


def status() -> Status:
    """The state of the database as this process sees it; loads it if no call has yet."""
    return _loaded().status


def find(
    kernel_name: str,
    problem: AttentionProblem,
    device: DeviceKey,
    *,
    kernel_source: Callable[[], str] | None = None,
) -> Found | None:
    """The stored config for a kernel and a problem, and its rung; None if nothing is known.

    Args:
        kernel_name: a name of the registry.
        problem: the call.
        device: where it runs.
        kernel_source: gives the kernel's source hash (`identity.source_of_files`); called only for
            a kernel with rows, at most once per bucket. Without it any source counts as the
            present one.

    Returns:
        ``(params, rung)``. The params are plain values: the caller rebuilds and validates the
        kernel's config.
        They belong to the table: copy before changing.
    """
    table = _table or _loaded()
    memo_key = (kernel_name, problem, device)
    try:
        return table.found[memo_key]
    except KeyError:
        pass
    bucket_key = (kernel_name, bucket(problem), device)
    found = table.by_bucket.get(bucket_key, _UNKNOWN)
    if found is _UNKNOWN:
        found = _search(table, *bucket_key, kernel_source)
        if len(table.by_bucket) >= _MEMO_ENTRIES:
            table.by_bucket.clear()
        table.by_bucket[bucket_key] = found
    if table.counts_misses and (found is None or found.rung in misses.ELSEWHERE):
        rung = misses.DEFAULT if found is None else found.rung
        misses.note(table.status.location, problem, device, rung)
    if len(table.found) >= _MEMO_ENTRIES:
        table.found.clear()
    table.found[memo_key] = found
    return found


def _tier(row: StoredConfig, fingerprint: str, source: str | None) -> int:
    """Index into RUNGS of a row of the right bucket and family."""
    if not row.device_fingerprint:
        return RUNGS.index("seeds")
    if row.device_fingerprint != fingerprint:
        return RUNGS.index("family")
    current = source in (None, row.source_sha256) and row.toolchain_class == toolchain_class(
        row.backend
    )
    return RUNGS.index("exact" if current else "stale")


def _is_answer(row: StoredConfig) -> bool:
    """Whether a row may be used unmeasured: seeds of another compiler are candidates only."""
    is_seed = not row.device_fingerprint
    return not (is_seed and row.toolchain_class) or (
        row.toolchain_class == toolchain_class(row.backend)
    )


def _search(
    table: _Table,
    kernel_name: str,
    key: ProblemKey,
    device: DeviceKey,
    kernel_source: Callable[[], str] | None,
) -> Found | None:
    """The ladder, for a bucket that this process has not met yet."""
    group = table.groups.get((kernel_name, device.family, *key.group))
    if group is None:
        return None
    keys = group.near(key, MAX_DISTANCE)
    rows = [row for near in keys for row in group.rows[near]]
    if not rows:
        return None
    fingerprint = _fingerprint(device)
    is_here = any(row.device_fingerprint == fingerprint for row in rows)
    source = kernel_source() if is_here and kernel_source is not None else None

    def rank(row: StoredConfig) -> tuple[int, tuple[bool, bool], int]:
        way = not row.policy.startswith(table.policy), not row.policy.endswith("cold")
        return _tier(row, fingerprint, source), way, row.median_ns

    best = min(rows, key=rank) if len(rows) > 1 else rows[0]
    rung = "nearest" if keys[0] is not key else RUNGS[_tier(best, fingerprint, source)]
    return Found({} if best.is_default else best.params, rung)


@functools.lru_cache(maxsize=64)
def _fingerprint(device: DeviceKey) -> str:
    """`DeviceKey.fingerprint`, which hashes each time."""
    return device.fingerprint


def known(kernel_name: str, family: str) -> list[StoredConfig]:
    """Everything that is stored or shipped for a kernel on devices of a family."""
    table = _table or _loaded()
    return [row for row in table.rows if row.kernel_name == kernel_name and row.family == family]


def ranking(names: Sequence[str], problem: AttentionProblem, device: DeviceKey) -> tuple[str, ...]:
    """The kernels measured on this device, or for the seeds, for this bucket or the nearest.

    Args:
        names: kernels to rank, preferred first; on a tie the preferred one comes first.
        problem: the call.
        device: where it runs.

    Returns:
        Some of names, fastest first. Empty if names[0] was not measured near enough: then nothing
        can overrule the preference.
    """
    table = _table or _loaded()
    if not table.groups or not names:
        return ()
    key = bucket(problem)
    kind = (device.family, *key.group)
    groups = {name: table.groups.get((name, *kind)) for name in names}
    first = groups[names[0]]
    if first is None:
        return ()
    for measured_on in (_fingerprint(device), ""):  # "": the seeds' device
        keys = first.measured_on(measured_on).near(key, MAX_DISTANCE)
        if not keys:
            continue
        times = {
            name: min(row.median_ns for row in rows)
            for name, group in groups.items()
            if group is not None and (rows := group.measured_on(measured_on).rows.get(keys[0]))
        }
        return tuple(sorted(times, key=times.__getitem__))
    return ()
