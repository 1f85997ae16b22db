"""What is shown: plain frozen data, every value of the type it says."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portattn.tuning_db.records import Params


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """A device that something was measured on.

    Attributes:
        fingerprint, name, family, vendor, arch: as `portattn.device.DeviceKey`.
        units: multiprocessors of a GPU, cores of a CPU.
        threads: of a CPU; 0 on a GPU.
        memory_bytes: of a GPU; 0 where not known.
        problems, measurements: how many it has.
    """

    fingerprint: str
    name: str
    family: str
    vendor: str
    arch: str
    units: int
    threads: int
    memory_bytes: int
    problems: int
    measurements: int


@dataclasses.dataclass(frozen=True, slots=True)
class Best:
    """The stored winner of one kernel for one problem.

    Attributes:
        kernel, backend, policy, toolchain: what, how it was timed, and with which compiler.
        params: the config's fields.
        median_ns, default_ns: of the winner and of the default.
        low_ns, high_ns: 95 % interval of the winner's median.
        confirmed_ns, confirmed_default_ns: again in a process of its own; None where not done.
        source: ``"tuned"``, ``"seed"``, ``"import"`` or ``"transfer"``.
        updated_us: when it was stored, UTC.
    """

    kernel: str
    backend: str
    policy: str
    toolchain: str
    params: Params
    median_ns: int
    default_ns: int
    low_ns: int
    high_ns: int
    confirmed_ns: int | None
    confirmed_default_ns: int | None
    source: str
    updated_us: int

    @property
    def gain(self) -> float:
        """How many times faster than the default."""
        return self.default_ns / self.median_ns

    @property
    def gain_interval(self) -> tuple[float, float]:
        """The gain at both ends of the median's interval; smaller first."""
        high = max(self.high_ns, self.median_ns)
        low = min(self.low_ns, self.median_ns) or self.median_ns
        return self.default_ns / high, self.default_ns / low

    @property
    def kept_default(self) -> bool:
        """Nothing beat the default."""
        return self.median_ns == self.default_ns


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One bucket of problems on one device.

    Attributes:
        key_sha256, label: which.
        bests: of its kernels, fastest first.
    """

    key_sha256: str
    label: str
    bests: tuple[Best, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One config tried: its fields, its median in ns or None, and why it was rejected."""

    params: Params
    status: str
    median_ns: int | None
    error: str


@dataclasses.dataclass(frozen=True, slots=True)
class Course:
    """The newest search of one kernel on one problem.

    Attributes:
        kernel, policy: what, and how it was timed.
        attempts: in the order in which they were made; finals are not among them.
        started_us: when the first was stored, UTC.
        left_out: how many of its attempts are not here: there were too many, or they are damaged.
    """

    kernel: str
    policy: str
    attempts: tuple[Attempt, ...]
    started_us: int
    left_out: int = 0

    @property
    def default_ns(self) -> int | None:
        """The default's time: it is the first candidate; None if it was not right."""
        return self.attempts[0].median_ns if self.attempts else None

    @property
    def rejected(self) -> dict[tuple[str, str], list[Attempt]]:
        """(status, first line of the reason) -> the attempts, the most frequent first."""
        groups: dict[tuple[str, str], list[Attempt]] = {}
        for one in self.attempts:
            if one.status != "ok":
                reason = next(iter(one.error.splitlines()), "")
                groups.setdefault((one.status, reason), []).append(one)
        return dict(sorted(groups.items(), key=lambda entry: -len(entry[1])))
