"""The search of a problem: its kernels take turns, so that none waits for another's compilers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from portattn.errors import TuningError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.tuner.contender import Contender
    from portattn.tuner.executor import Executor
    from portattn.tuner.pool import CompilePool

_POLL_SECONDS = 0.05

Told = Callable[["Contender"], None]


def search(
    contenders: Sequence[Contender],
    executor: Executor,
    deadline: float,
    told: Told,
    *,
    pool: CompilePool | None = None,
    priority: int = 0,
    most: int | None = None,
) -> None:
    """Try configs until the deadline, until none is left, or until `most` of each were tried.

    Whichever has something ready and took the least time so far is next. Every default is tried,
    whatever the time.

    Args:
        contenders: of one problem.
        executor: at their case.
        deadline: on `time.monotonic`.
        told: called after each.
        pool: compiles configs ahead; without, running one compiles it.
        priority: of this problem in the pool.
        most: bound on a kernel's configs; None for no bound.
    """
    active = list(contenders)
    while active:
        for one in active:
            one.fill(pool, priority, most, len(active))
        active = [one for one in active if one.is_open]
        if time.monotonic() > deadline:
            active = [one for one in active if not one.verdicts]
        ready = [one for one in active if one.is_ready]
        if ready:
            chosen = min(ready, key=lambda one: (bool(one.verdicts), one.spent_s))
            before = chosen.spent_s
            chosen.step(executor)
            told(chosen)
            if time.monotonic() + chosen.spent_s - before > deadline:  # the next takes as long
                active = [one for one in active if not one.verdicts]
        elif active:
            _wait(pool)
    for one in contenders:
        one.drop()


def _wait(pool: CompilePool | None) -> None:
    assert pool is not None
    if pool.problem:
        raise TuningError(
            f"no process that compiles can be started: {pool.problem}. Is `python -m "
            "portattn.tuner.worker` fine?"
        )
    with pool.finished:
        pool.finished.wait(_POLL_SECONDS)
