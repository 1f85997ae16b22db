"""A worker of the fleet: takes jobs from the shared table and tunes them, one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from portattn import masks
from portattn.device import device_key
from portattn.errors import TuningError
from portattn.problem import AttentionProblem
from portattn.tuner import cases
from portattn.tuner.cases import Case
from portattn.tuner.executor import DeviceLostError
from portattn.tuner.timers import POLICIES
from portattn.tuner.tune import tune
from portattn.tuning_db import jobs
from portattn.tuning_db.jobs import LEASE_SECONDS, Lease, LostLeaseError
from portattn.tuning_db.key import bucket
from portattn.tuning_db.runs import LostRunError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from portattn.tuner.report import ProgressCallback, TuningReport
    from portattn.tuning_db.store import Store

# What `options_json` of a job may say, with bounds: it comes from a table that others write.
_OPTIONS: dict[str, tuple[type, float, float]] = {
    "budget_seconds": (float, 0.001, 86400.0),
    "most": (int, 1, 200_000),
    "seed": (int, 0, 2**31 - 1),
}
_POLICIES = tuple(dict.fromkeys(policy for known in POLICIES.values() for policy in known))
POLL_SECONDS = 2.0
_MOST = 1 << 26
_SIZES = ("batch", "num_heads", "num_kv_heads", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v")


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """One job as its worker left it.

    Attributes:
        lease: the job.
        state: ``"done"``, ``"failed"``, or ``"lost"`` to another worker.
        label: its problem; "" if the job cannot be read.
        error: why it is not done.
        report: of the tuning; None unless it is done.
    """

    lease: Lease
    state: str
    label: str
    error: str = ""
    report: TuningReport | None = None


Told = Callable[[Finished], None]


def submit(
    store: Store,
    problems: Sequence[Case],
    family: str,
    *,
    kernels: Sequence[str] | None = None,
    priority: int = 0,
    options: dict[str, int | float | str] | None = None,
) -> int:
    """Queue problems for the workers of a kind of device.

    Args:
        store: the shared database.
        problems: what to tune; one job each, and for each kernel if some are named.
        family: of the devices (`DeviceKey.family`).
        kernels: names; None for every kernel in one job.
        priority: larger ones go first.
        options: budget_seconds, most, seed, policy.

    Returns:
        How many jobs are new; others wait already.

    Raises:
        TuningError: an option is not allowed, or the database cannot be used.
    """
    given = dict(options or {})
    _checked(given)
    return sum(
        jobs.enqueue(
            store,
            family,
            bucket(case.problem),
            case.to_json(),
            kernel=kernel,
            priority=priority,
            options=given,
        )
        for case in problems
        for kernel in kernels or ("",)
    )


def _checked(options: object) -> dict[str, Any]:
    """Options of a job, if they are ones that may be given."""
    if not isinstance(options, dict):
        raise TuningError("the job's options are not an object")
    for name, value in options.items():
        if name == "policy" and value in _POLICIES:
            continue
        kind, low, high = _OPTIONS.get(name, (None, 0, 0))
        is_kind = type(value) is kind or (kind is float and type(value) is int)
        if kind is None or not is_kind or not low <= value <= high:
            raise TuningError(
                f"option {str(name)[:40]!r} of a job is {str(value)[:40]}; allowed are "
                + ", ".join(f"{key} in [{one[1]}, {one[2]}]" for key, one in _OPTIONS.items())
                + f", policy among {', '.join(_POLICIES)}"
            )
    return options


def read(lease: Lease, device: str) -> tuple[Case, dict[str, Any]]:
    """A job's case, on a device of this machine, and the options of `tune`.

    Raises:
        TuningError: the row does not hold such; nothing of it was used.
    """
    try:
        options = _checked(json.loads(lease.options_json))
        case = _case(json.loads(lease.case_json), device)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise TuningError(
            f"job {lease.job_id} cannot be read: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    return case, options


def _case(values: dict[str, Any], device: str) -> Case:
    """A case of `Case.to_json` on a device, every field checked.

    Raises:
        ValueError, TypeError, KeyError: it is not one.
    """
    mask = None if values["mask"] is None else masks.from_json(json.dumps(values["mask"]))
    given = values["problem"]
    sizes = {name: given[name] for name in (*_SIZES, "q_offset")}
    for name, value in sizes.items():
        low = -_MOST if name == "q_offset" else 1
        if type(value) is not int or not low <= value <= _MOST:
            raise ValueError(f"{name} is {str(value)[:40]}; it must be in [{low}, {_MOST}]")
    features = frozenset(given["features"])
    if given["dtype"] not in cases.DTYPES or not features <= set(cases.FEATURES):
        raise ValueError("its dtype or a feature is not known")
    program = () if mask is None else mask.program
    if list(program) != given["program"]:
        raise ValueError("its program is not that of its mask")
    problem = AttentionProblem(
        device_type=device.partition(":")[0],
        device=device,
        dtype=given["dtype"],
        program=program,
        features=features,
        **sizes,
    )
    return Case(problem, mask)


class _Heartbeat:
    """Renews a lease from a thread of its own, over a connection of its own."""

    def __init__(self, store: Store, lease: Lease, seconds: float) -> None:
        self._store, self._lease, self._seconds = store, lease, seconds
        self._stopped = threading.Event()

    def _beat(self) -> None:
        while not self._stopped.wait(self._seconds / 4):
            try:
                jobs.renew(self._store, self._lease, seconds=self._seconds)
            except LostLeaseError:
                return  # the run is another's too: the next write says so
            except TuningError:
                continue  # busy or away for now; the lease lasts for some more beats

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Keep the lease inside the with statement."""
        thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()


def work(
    store: Store,
    devices: Sequence[str],
    *,
    stay: bool = False,
    lease_seconds: float = LEASE_SECONDS,
    told: Told | None = None,
    progress: ProgressCallback | None = None,
    options: dict[str, Any] | None = None,
) -> list[Finished]:
    """Tune jobs until none waits for these devices.

    Args:
        store: the shared database.
        devices: torch devices, of different families.
        stay: wait for more jobs instead of ending; until interrupted.
        lease_seconds: a worker that gives no sign of life for so long loses its job.
        told: called after each job.
        progress: of the tuning.
        options: for `tune` beside those of the jobs.

    Returns:
        The jobs, in order.

    Raises:
        TuningError: the database cannot be used.
        DeviceLostError: the device cannot be used; the job waits for another worker.
    """
    by_family = {device_key(device).family: device for device in devices}
    owner = f"{socket.gethostname()[:80]} {os.getpid()}"
    finished: list[Finished] = []
    while True:
        lease = jobs.take(store, list(by_family), owner, seconds=lease_seconds)
        if lease is None:
            if not stay:
                return finished
            time.sleep(POLL_SECONDS)
            continue
        with _Heartbeat(store, lease, lease_seconds).beating():
            one = _do(store, lease, by_family[lease.family], progress, options or {})
        finished.append(one)
        if told is not None:
            told(one)


def _do(
    store: Store,
    lease: Lease,
    device: str,
    progress: ProgressCallback | None,
    options: dict[str, Any],
) -> Finished:
    """Tune one job and give it back."""
    label = ""
    try:
        case, asked = read(lease, device)
        label = bucket(case.problem).label
        kernels = {"kernels": [lease.kernel]} if lease.kernel else {}
        report = tune(
            [case],
            device=device,
            store=store,
            progress=progress,
            lease=lease,
            **{**options, **kernels, **asked},
        )
        jobs.finish(store, lease, "done")
    except (LostLeaseError, LostRunError) as error:
        return Finished(lease, "lost", label, str(error))
    except DeviceLostError as error:
        jobs.finish(store, lease, "queued", str(error))
        raise
    except Exception as error:  # whatever tuning this problem raises is about this problem
        text = str(error) if isinstance(error, TuningError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(LostLeaseError):
            jobs.finish(store, lease, "failed", text)
        return Finished(lease, "failed", label, text[:2000])
    except BaseException:  # interrupted: another worker may go on at once
        with contextlib.suppress(TuningError):
            jobs.finish(store, lease, "queued")
        raise
    return Finished(lease, "done", label, report=report)
