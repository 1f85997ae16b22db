"""`tune`: finds and stores the best config of every kernel for the problems given."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import torch

from portattn import dispatch
from portattn.backends import registry
from portattn.backends.base import Kernel
from portattn.device import device_key
from portattn.errors import TuningError
from portattn.tuner import cases, measure
from portattn.tuner.cases import Case
from portattn.tuner.contender import Contender
from portattn.tuner.finals import finals, verdict
from portattn.tuner.report import (
    ProblemReport,
    Progress,
    ProgressCallback,
    TuningReport,
)
from portattn.tuner.space import SpaceError
from portattn.tuner.verify import Verifier
from portattn.tuning_db import lookup
from portattn.tuning_db.key import bucket
from portattn.tuning_db.records import ProblemResult
from portattn.tuning_db.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.device import DeviceKey
    from portattn.problem import AttentionProblem

# Of a problem's time, what the interleaved finals get at most.
_FINALS_SHARE = 0.3


@dataclasses.dataclass(frozen=True, slots=True)
class _Session:
    """What stays the same over one run."""

    store: Store
    run_id: str
    device: DeviceKey
    timer: measure.Timer
    progress: ProgressCallback | None
    started: float
    budget_s: float
    problems: int
    seed: int

    def tell(
        self, problem: int, label: str, stage: str, contender: Contender | None = None
    ) -> None:
        """Report progress."""
        if self.progress is None:
            return
        times = contender.times_ns if contender is not None else {}
        self.progress(
            Progress(
                problem=problem,
                problems=self.problems,
                label=label,
                stage=stage,
                kernel=contender.kernel.name if contender is not None else "",
                tried=len(contender.measurements) if contender is not None else 0,
                feasible=len(contender.space.configs) if contender is not None else 0,
                best_ns=min(times.values(), default=None),
                default_ns=times.get(contender.default) if contender is not None else None,
                elapsed_s=time.monotonic() - self.started,
                budget_s=self.budget_s,
            )
        )


def tune(
    problems: Sequence[AttentionProblem | Case] | None = None,
    *,
    budget_seconds: float = 60.0,
    device: str = "cpu",
    kernels: Sequence[str | Kernel] | None = None,
    store: Store | None = None,
    progress: ProgressCallback | None = None,
    timer: measure.Timer | None = None,
    seed: int = 0,
) -> TuningReport:
    """Find and store the best config of every kernel for some problems on one device.

    Every candidate is checked against the float64 reference before it is timed. The default config
    is the first candidate and stays unless another is faster beyond noise. Each problem is stored
    in one transaction as soon as it is done, so that stopping loses at most the one being worked
    on.

    Args:
        problems: what to tune; None takes `cases.defaults`. A problem whose mask needs data is
            given as a `Case`.
        budget_seconds: for all problems together. The first problem is always done, with its
            default at least.
        device: a torch device, ``"cpu"`` or ``"cuda"``.
        kernels: names of the registry or kernel objects; None takes all but the reference.
        store: where to; None opens the default database.
        progress: called often.
        timer: how runs are timed; None takes the device's own.
        seed: of the search.

    Raises:
        TuningError: the device cannot be tuned, no kernel can run a problem, or the database
            cannot be used.
    """
    if budget_seconds <= 0:
        raise TuningError(f"budget_seconds is {budget_seconds}; it must be positive")
    chosen = [
        case if isinstance(case, Case) else cases.from_problem(case)
        for case in problems or cases.defaults(device)
    ]
    store = Store() if store is None else store
    run_id = store.begin_run(effort="budget", seed=seed, budget={"seconds": round(budget_seconds)})
    session = _Session(
        store=store,
        run_id=run_id,
        device=device_key(device),
        timer=measure.timer_for(device) if timer is None else timer,
        progress=progress,
        started=time.monotonic(),
        budget_s=budget_seconds,
        problems=len(chosen),
        seed=seed,
    )
    state, reports = "failed", []
    try:
        for number, case in enumerate(chosen):
            left = budget_seconds - (time.monotonic() - session.started)
            if number and left <= 0:
                break
            deadline = time.monotonic() + left / (len(chosen) - number)
            reports.append(_tune_problem(session, number, case, kernels, deadline))
        _check_any_tuned(reports)
        state = "done" if len(reports) == len(chosen) else "partial"
    finally:
        store.finish_run(run_id, state)
        forget_loaded()
    return TuningReport(
        device=session.device.name,
        database=store.location.shown,
        problems=tuple(reports),
        left_out=tuple(bucket(case.problem).label for case in chosen[len(reports) :]),
        seconds=time.monotonic() - session.started,
    )


def _check_any_tuned(reports: Sequence[ProblemReport]) -> None:
    """Some problems without a kernel are told in the report; nothing but such is an error."""
    if any(report.kernels for report in reports):
        return
    reasons = "; ".join(
        f"{report.label}: {name} {', '.join(why)}"
        for report in reports
        for name, why in report.refused.items()
    )
    raise TuningError(
        f"no kernel can run any of the problems ({reasons}). Change them or kernels="
    )


def forget_loaded() -> None:
    """Make this process see what the database holds now."""
    from portattn import call

    lookup.reload()
    call.clear_cache()


def candidates(
    problem: AttentionProblem, kernels: Sequence[str | Kernel] | None
) -> tuple[list[Kernel], dict[str, tuple[str, ...]]]:
    """The kernels that can run a problem, and why each other one cannot.

    Raises:
        TuningError: a name is not in the registry.
    """
    wanted = dispatch.candidates("auto") if kernels is None else kernels
    usable: list[Kernel] = []
    refused: dict[str, tuple[str, ...]] = {}
    for one in wanted:
        if isinstance(one, Kernel):
            name, why = one.name, tuple(one.unsupported_reasons(problem))
        elif one in registry.KERNELS:
            name, why = one, dispatch.refusals(one, problem)
        else:
            raise TuningError(
                f"kernel is {one!r}; it must be one of {', '.join(registry.KERNELS)}"
            )
        if why:
            refused[name] = why
        else:
            usable.append(one if isinstance(one, Kernel) else registry.kernel(one))
    return usable, refused


def _tune_problem(
    session: _Session,
    number: int,
    case: Case,
    kernels: Sequence[str | Kernel] | None,
    deadline: float,
) -> ProblemReport:
    started = time.monotonic()
    problem, key = case.problem, bucket(case.problem)
    usable, refused = candidates(problem, kernels)
    session.tell(number, key.label, "verify")
    with torch.no_grad():
        contenders: list[Contender] = []
        for one in usable:
            try:
                contender = Contender(
                    one, problem, session.device, key, session.store, session.seed
                )
                contenders.append(contender)
            except SpaceError as error:
                refused[one.name] = (str(error),)
        if not contenders:
            return ProblemReport(key.label, (), refused, 0.0)
        verifier = Verifier(case)
        search_end = deadline - _FINALS_SHARE * max(deadline - time.monotonic(), 0)
        for index, contender in enumerate(contenders):
            now = time.monotonic()
            share = now + max(search_end - now, 0) / (len(contenders) - index)
            contender.search(
                verifier,
                session.timer,
                share,
                lambda one: session.tell(number, key.label, "search", one),
            )
        session.tell(number, key.label, "finals")
        rounds = finals(contenders, verifier, session.timer, deadline)
    results, reports = zip(
        *(verdict(one, *final) for one, final in zip(contenders, rounds, strict=True)),
        strict=True,
    )
    session.store.record(
        session.run_id,
        ProblemResult(session.device, key, _shape(problem), measure.POLICY, tuple(results)),
    )
    session.tell(number, key.label, "stored")
    ordered = sorted(reports, key=lambda report: (report.params is None, report.best_ns))
    return ProblemReport(key.label, tuple(ordered), refused, time.monotonic() - started)


def _shape(problem: AttentionProblem) -> dict[str, int | str]:
    names = (
        "batch",
        "num_heads",
        "num_kv_heads",
        "seqlen_q",
        "seqlen_k",
        "head_dim",
        "head_dim_v",
        "q_offset",
        "dtype",
    )
    return {name: getattr(problem, name) for name in names}
