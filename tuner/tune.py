"""`tune`: finds and stores the best config of every kernel for the problems given."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from portattn.device import device_key
from portattn.errors import TuningError
from portattn.tuner import cases, measure
from portattn.tuner.cases import Case
from portattn.tuner.finals import finals, verdict
from portattn.tuner.pool import CompilePool
from portattn.tuner.portfolio import Portfolio
from portattn.tuner.report import ProblemReport, ProgressCallback, TuningReport
from portattn.tuner.session import Problem, Session, executor_for, prepare
from portattn.tuning_db import lookup, quarantine
from portattn.tuning_db.key import bucket
from portattn.tuning_db.records import ProblemResult
from portattn.tuning_db.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from portattn.backends.base import Kernel
    from portattn.problem import AttentionProblem
    from portattn.tuner.executor import Executor

# Of a problem's time, what the interleaved finals get at most.
_FINALS_SHARE = 0.3


def tune(
    problems: Sequence[AttentionProblem | Case] | None = None,
    *,
    budget_seconds: float = 60.0,
    device: str = "cpu",
    kernels: Sequence[str | Kernel] | None = None,
    store: Store | None = None,
    progress: ProgressCallback | None = None,
    timer: measure.Timer | None = None,
    executor: Executor | None = None,
    pool: CompilePool | None = None,
    seed: int = 0,
    most: int | None = None,
) -> TuningReport:
    """Find and store the best config of every kernel for some problems on one device.

    Every candidate is checked against the float64 reference before it is timed. The default config
    is the first candidate and stays unless another is faster beyond noise. Each problem is stored
    in one transaction as soon as it is done, so that stopping loses at most the one being worked
    on. On a GPU, candidates are compiled in many processes and run in one of their own: one that
    hangs or crashes ends there.

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
    key = device_key(device)
    if executor is None:
        executor = executor_for(device, timer, kernels)
        # Triton and CuPy compile for NVIDIA's devices without touching one.
        if pool is None and timer is None and key.kind == "cuda":
            pool = CompilePool(key)
    state, reports = "failed", list[ProblemReport]()
    with contextlib.ExitStack() as stack:
        stack.callback(forget_loaded)
        stack.callback(lambda: store.finish_run(run_id, state))
        stack.callback(executor.close)
        if pool is not None:
            stack.enter_context(pool)
        session = Session(
            store=store,
            run_id=run_id,
            device=key,
            executor=executor,
            pool=pool,
            portfolio=Portfolio(key.family),
            kernels=kernels,
            progress=progress,
            started=time.monotonic(),
            budget_s=budget_seconds,
            problems=len(chosen),
            seed=seed,
            most=most,
        )
        for report in _reports(session, chosen):
            reports.append(report)
        _check_any_tuned(reports)
        state = "done" if len(reports) == len(chosen) else "partial"
    return TuningReport(
        device=session.device.name,
        database=store.location.shown,
        problems=tuple(reports),
        left_out=tuple(bucket(case.problem).label for case in chosen[len(reports) :]),
        seconds=time.monotonic() - session.started,
    )


def _reports(session: Session, chosen: Sequence[Case]) -> Iterator[ProblemReport]:
    """Tune one problem after the other while there is time."""
    ahead: Problem | None = None
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
        deadline = time.monotonic() + left / (len(chosen) - number)
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
    for index, contender in enumerate(contenders):
        now = time.monotonic()
        contender.search(
            session.executor,
            now + max(search_end - now, 0) / (len(contenders) - index),
            lambda one: session.tell(number, label, "search", one),
            pool=session.pool,
            priority=number,
            most=session.most,
        )
        quarantine.add(
            session.store,
            contender.kernel.name,
            contender.source_sha256,
            session.device.family,
            contender.failed(),
        )
    session.tell(number, label, "finals")
    rounds = finals(contenders, session.executor, deadline)
    results, reports = zip(
        *(verdict(one, *final) for one, final in zip(contenders, rounds, strict=True)),
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
            _shape(problem.case.problem),
            session.executor.policy,
            tuple(results),
        ),
    )
    session.tell(number, label, "stored")
    ordered = sorted(reports, key=lambda report: (report.params is None, report.best_ns))
    return ProblemReport(label, tuple(ordered), problem.refused, time.monotonic() - started)


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
