"""What the tuner hands to the store, and what the store hands back. Plain frozen data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portattn.device import DeviceKey
    from portattn.tuning_db.key import ProblemKey

Params = dict[str, int | bool | str]


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Statistics of one config's samples, integer ns; the interval is the median's, at 95 %."""

    median_ns: int
    p20_ns: int
    p80_ns: int
    mean_ns: int
    stdev_ns: int
    n: int
    ci95_lo_ns: int
    ci95_hi_ns: int


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """One config, tried once.

    Attributes:
        params: the config's fields.
        round: 0 while searching, 1 among the finalists; one run measures a config at most once per
            round.
        status: one of `schema.STATUSES`.
        timing: None unless status is ``"ok"``.
        default_ns: median of the default measured interleaved with it; None while searching.
        max_abs_err, max_rel_err: against the float64 reference; None if it did not get that far.
        compile_ns: first call less a later one; None if not known.
        error: why it was rejected, at most 2 KiB.
    """

    params: Params
    round: int
    status: str
    timing: Timing | None = None
    default_ns: int | None = None
    max_abs_err: float | None = None
    max_rel_err: float | None = None
    compile_ns: int | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """What is measured, but for the config: one kernel on one problem, in one way.

    Attributes:
        device: where.
        key: the bucket.
        shape: the exact sizes, by the names of AttentionProblem.
        policy: how it is timed, e.g. ``"eager_warm"``.
        kernel_name, backend, source_sha256, space_sha256: the kernel's identity.
    """

    device: DeviceKey
    key: ProblemKey
    shape: dict[str, int | str]
    policy: str
    kernel_name: str
    backend: str
    source_sha256: str
    space_sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class KernelResult:
    """What tuning one kernel for one problem found.

    Attributes:
        kernel_name, backend, toolchain_class, source_sha256, space_sha256: the kernel's identity.
        measurements: what is to be stored with the verdict: the finals. What was tried before is
            stored already (`Store.add`).
        best: the winner's finalist measurement, with timing and default_ns; None if not even the
            default ran.
        verified_seeds, verified_rule: how the winner was checked.
        expected_rev: `Incumbent.rev` of the row that the winner was measured against; 0 if there
            was none.
        confirmed_ns, confirmed_default_ns: medians of the winner and of the default in a process
            of its own; None where that was not done.
    """

    kernel_name: str
    backend: str
    toolchain_class: str
    source_sha256: str
    space_sha256: str
    measurements: tuple[Measurement, ...]
    best: Measurement | None
    verified_seeds: int
    verified_rule: str
    expected_rev: int = 0
    confirmed_ns: int | None = None
    confirmed_default_ns: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ProblemResult:
    """What tuning one problem on one device found: one transaction of the store.

    Attributes:
        device: where.
        key: the bucket.
        shape: the exact sizes measured, by the names of AttentionProblem.
        policy: how it was timed, e.g. ``"eager_warm"``.
        kernels: one result per kernel.
    """

    device: DeviceKey
    key: ProblemKey
    shape: dict[str, int | str]
    policy: str
    kernels: tuple[KernelResult, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Incumbent:
    """The stored winner: its fields and the revision of its row."""

    params: Params
    rev: int
