"""`tune`: finds and stores the best config of every kernel for the problems given."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from portattn.backends import registry
from portattn.device import device_key
from portattn.errors import TuningError
from portattn.tuner import cases, turns
from portattn.tuner.cases import Case
from portattn.tuner.confirm import Confirmation, confirm
from portattn.tuner.finals import finals, verdict
from portattn.tuner.pool import CompilePool
from portattn.tuner.portfolio import Portfolio
from portattn.tuner.remote import RemoteExecutor
from portattn.tuner.report import ProblemReport, ProgressCallback, TuningReport
from portattn.tuner.session import Problem, Session, executor_for, prepare, shares
from portattn.tuner.work import describe, shape_of
from portattn.tuning_db import lookup, quarantine
from portattn.tuning_db.key import bucket
from portattn.tuning_db.records import ProblemResult
from portattn.tuning_db.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from portattn.backends.base import Kernel
    from portattn.problem import AttentionProblem
    from portattn.tuner.executor import Executor
    from portattn.tuner.timers import Timer
    from portattn.tuning_db.jobs import Lease
    from portattn.tuning_db.records import Measurement

# Of a problem's time, what the interleaved finals get at most, and of that what confirming the
# winners gets.
_FINALS_SHARE = 0.35
_CONFIRM_SHARE = 0.4


def tune(
    problems: Sequence[AttentionProblem | Case] | None = None,
    *,
    budget_seconds: float = 60.0,
    device: str = "cpu",
    kernels: Sequence[str | Kernel] | None = None,
    store: Store | None = None,
    progress: ProgressCallback | None = None,
    timer: Timer | None = None,
    executor: Executor | None = None,
    pool: CompilePool | None = None,
    seed: int = 0,
    most: int | None = None,
    policy: str | None = None,
    confirm: bool = True,
    resume: bool = True,
    lease: Lease | None = None,
) -> TuningReport:
    """Find and store the best config of every kernel for some problems on one device.

    Every candidate is checked against the float64 reference before it is timed. The default config
    is the first candidate and stays unless another is faster beyond noise. Each measurement is
    stored as soon as it is made, and each problem's result when it is done; a run that was stopped
    goes on where it was when the same one is started again. On a GPU, candidates are compiled in
    many processes and run in one of their own: one that hangs or crashes ends there.

    Args:
        problems: what to tune; None takes `cases.defaults`. A problem whose mask needs data is
            given as a `Case`.
        budget_seconds: for all problems together. The first problem is always done, with its
            default at least.
        device: a torch device, ``"cpu"`` or ``"cuda"``.
        kernels: names of the registry or kernel objects; None takes all but the reference.
        store: where to; None opens the default database.
        progress: called often.
        timer: how runs are timed in this process; None takes the device's own.
        executor: who verifies and times; None makes the device's own.
        pool: compiles ahead; None makes one where the device's own executor runs on a GPU.
        seed: of the search.
        most: configs to try of each kernel on each problem; None for as many as the time allows.
        policy: how runs are timed: one of `timers.POLICIES`; part of the key that results are
            stored under. None takes the device's first.
        confirm: a winner is stored only if it beats the default in a fresh process as well; not
            where `executor` or `timer` is given, and not for kernel objects.
        resume: go on with an unfinished run that does the same; False begins a new one.
        lease: the job of the fleet that this is (`portattn.tuner.jobs`).

    Raises:
        TuningError: the device cannot be tuned, no kernel can run a problem, or the database
            cannot be used.
    """
    if budget_seconds <= 0:
        raise TuningError(f"budget_seconds is {budget_seconds}; it must be positive")
    given = (
        case if isinstance(case, Case) else cases.from_problem(case)
        for case in problems or cases.defaults(device)
    )
    chosen = list(dict.fromkeys(given))
    store = Store() if store is None else store
    key = device_key(device)
    confirmer: Executor | None = None
    if executor is None:
        executor = executor_for(device, timer, kernels, policy)
        if confirm and timer is None:
            confirmer = RemoteExecutor(device, executor.policy)
        # Triton and CuPy compile for NVIDIA's devices without touching one.
        if pool is None and timer is None and key.kind == "cuda":
            pool = CompilePool(key)
    run_id = store.begin_run(
        effort="budget",
        seed=seed,
        budget={"seconds": round(budget_seconds)},
        work=describe(chosen, key, executor.policy, kernels, seed=seed, most=most),
        resume=resume,
        lease=lease,
    )
    done = [
        case
        for case in chosen
        if store.decided(run_id, bucket(case.problem), shape_of(case), executor.policy)
    ]
    left = [case for case in chosen if case not in done]
    state, reports = "failed", list[ProblemReport]()
    with contextlib.ExitStack() as stack:
        stack.callback(forget_loaded)
        stack.callback(lambda: store.finish_run(run_id, state))
        stack.callback(executor.close)
        if confirmer is not None:
            stack.callback(confirmer.close)
        if pool is not None:
            stack.enter_context(pool)
        session = Session(
            store=store,
            run_id=run_id,
            device=key,
            executor=executor,
            confirmer=confirmer,
            pool=pool,
            portfolio=Portfolio(key.family),
            kernels=kernels,
            progress=progress,
            started=time.monotonic(),
            budget_s=budget_seconds,
            problems=len(left),
            seed=seed,
            most=most,
        )
        for report in _reports(session, left):
            reports.append(report)
        if not done:
            _check_any_tuned(reports)
        state = "done" if len(reports) == len(left) else "partial"
    return TuningReport(
        device=session.device.name,
        database=store.location.shown,
        problems=tuple(reports),
        left_out=tuple(bucket(case.problem).label for case in left[len(reports) :]),
        seconds=time.monotonic() - session.started,
        resumed=tuple(bucket(case.problem).label for case in done),
    )


def _reports(session: Session, chosen: Sequence[Case]) -> Iterator[ProblemReport]:
    """Tune one problem after the other while there is time."""
    ahead: Problem | None = None
    weights = [1.0] * len(chosen)
    if session.pool is not None:
        weights = shares([case.problem for case in chosen], session.kernels)
    for number, case in enumerate(chosen):
        left = session.budget_s - (time.monotonic() - session.started)
        if number and left <= 0:
            return
        problem = prepare(session, number, case) if ahead is None else ahead
        ahead = None
        session.tell(number, problem.key.label, "verify")
        if not problem.contenders:
            yield ProblemReport(problem.key.label, (), problem.refused, 0.0)
            continue
        started = time.monotonic()
        session.executor.begin(case)
        if session.pool is not None and number + 1 < len(chosen):
            ahead = prepare(session, number + 1, chosen[number + 1])
        left = session.budget_s - (time.monotonic() - session.started)
        deadline = time.monotonic() + left * weights[number] / sum(weights[number:])
        yield _tune_problem(session, problem, started, deadline)


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


def _tune_problem(
    session: Session, problem: Problem, started: float, deadline: float
) -> ProblemReport:
    """Search, finals, and one transaction that stores them."""
    number, contenders, label = problem.number, problem.contenders, problem.key.label
    search_end = deadline - _FINALS_SHARE * max(deadline - time.monotonic(), 0)
    turns.search(
        contenders,
        session.executor,
        search_end,
        lambda one: session.tell(number, label, "search", one),
        pool=session.pool,
        priority=number,
        most=session.most,
    )
    for contender in contenders:
        quarantine.add(
            session.store,
            contender.kernel.name,
            contender.source_sha256,
            session.device.family,
            contender.failed(),
        )
    session.tell(number, label, "finals")
    share = _CONFIRM_SHARE if session.confirmer is not None else 0.0
    rounds = finals(
        contenders, session.executor, search_end + (1 - share) * (deadline - search_end)
    )
    confirmed = _confirm(session, problem, rounds, deadline)
    results, reports = zip(
        *(
            verdict(one, *final, confirmation)
            for one, final, confirmation in zip(contenders, rounds, confirmed, strict=True)
        ),
        strict=True,
    )
    for contender, result in zip(contenders, results, strict=True):
        if result.best is not None:
            session.portfolio.add(contender.kernel.name, problem.key, result.best.params)
    session.store.record(
        session.run_id,
        ProblemResult(
            session.device,
            problem.key,
            shape_of(problem.case),
            session.executor.policy,
            tuple(results),
        ),
    )
    session.tell(number, label, "stored")
    ordered = sorted(reports, key=lambda report: (report.params is None, report.best_ns))
    return ProblemReport(label, tuple(ordered), problem.refused, time.monotonic() - started)


def _confirm(
    session: Session,
    problem: Problem,
    rounds: Sequence[tuple[list[Measurement], int]],
    deadline: float,
) -> list[Confirmation | None]:
    """Each kernel's winner beside its default in the process for that; None where that stayed."""
    found: list[Confirmation | None] = [None] * len(rounds)
    wanted = [
        index
        for index, (one, (_, winner)) in enumerate(zip(problem.contenders, rounds, strict=True))
        if winner and registry.KERNELS.get(one.kernel.name)
    ]
    if session.confirmer is None or not wanted:
        return found
    session.tell(problem.number, problem.key.label, "confirm")
    session.confirmer.begin(problem.case)
    for number, index in enumerate(wanted):
        one, (measured, winner) = problem.contenders[index], rounds[index]
        left = max(deadline - time.monotonic(), 0) / (len(wanted) - number)
        best = one.kernel.config_from_dict(measured[winner].params)
        found[index] = confirm(one.kernel, one.default, best, session.confirmer, left)
    return found
