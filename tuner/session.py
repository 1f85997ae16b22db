"""One run of the tuner: what stays the same over it, and what a problem starts with."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from portattn import dispatch
from portattn.backends import registry
from portattn.backends.base import Kernel
from portattn.errors import TuningError
from portattn.masks.opcodes import DIFF_MODULO, KEY_MODULO, instructions
from portattn.tuner import timers
from portattn.tuner.contender import Contender
from portattn.tuner.executor import Executor, LocalExecutor
from portattn.tuner.remote import RemoteExecutor
from portattn.tuner.report import Progress, ProgressCallback
from portattn.tuner.space import SpaceError
from portattn.tuning_db.key import bucket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.device import DeviceKey
    from portattn.problem import AttentionProblem
    from portattn.tuner.cases import Case
    from portattn.tuner.pool import CompilePool
    from portattn.tuner.portfolio import Portfolio
    from portattn.tuner.timers import Timer
    from portattn.tuning_db.key import ProblemKey
    from portattn.tuning_db.store import Store

# Of each kernel of the next problem, configs compiled while this one is measured.
_PREFETCHED = 12
# A problem whose code nothing compiled before it waits for compilers: its time beside others'.
_NEW_CODE_SHARE = 2.5


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One problem with the kernels that take part.

    Attributes:
        number: from 0.
        case, key: what, and its bucket.
        contenders: the kernels being tuned.
        refused: kernel -> why it is not.
    """

    number: int
    case: Case
    key: ProblemKey
    contenders: tuple[Contender, ...]
    refused: dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """What stays the same over one run.

    `confirmer` runs in a process of its own, in which nothing else runs; None where winners are
    stored as the finals found them.
    """

    store: Store
    run_id: str
    device: DeviceKey
    executor: Executor
    confirmer: Executor | None
    pool: CompilePool | None
    portfolio: Portfolio
    kernels: Sequence[str | Kernel] | None
    progress: ProgressCallback | None
    started: float
    budget_s: float
    problems: int
    seed: int
    most: int | None

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


def executor_for(
    device: str,
    timer: Timer | None,
    kernels: Sequence[str | Kernel] | None,
    policy: str | None = None,
) -> Executor:
    """In a process of its own; in this one for kernel objects on a CPU, and with a given timer."""
    if timer is not None:
        return LocalExecutor(timer)
    policy = timers.policy_for(device, policy)
    objects = [one.name for one in kernels or () if isinstance(one, Kernel)]
    if objects and not device.startswith("cuda"):
        return LocalExecutor(timers.timer_for(device, policy))
    if objects:
        raise TuningError(
            f"kernels are the objects {', '.join(objects)}; on a GPU, where they run in another "
            "process, give names of the registry"
        )
    return RemoteExecutor(device, policy)


def prepare(session: Session, number: int, case: Case) -> Problem:
    """A problem's contenders; their first configs are on their way to the compilers."""
    key = bucket(case.problem)
    usable, refused = candidates(case.problem, session.kernels)
    contenders: list[Contender] = []
    for one in usable:
        try:
            contender = Contender(
                one,
                case,
                session.device,
                key,
                session.store,
                session.portfolio,
                run_id=session.run_id,
                policy=session.executor.policy,
                seed=session.seed,
            )
        except SpaceError as error:
            refused[one.name] = (str(error),)
            continue
        contenders.append(contender)
        if session.pool is not None:
            count = _PREFETCHED if session.most is None else min(_PREFETCHED, session.most)
            contender.prefetch(session.pool, number, count)
    return Problem(number, case, key, tuple(contenders), refused)


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


def shared_code(kernel: Kernel, problem: AttentionProblem) -> tuple[object, ...]:
    """Problems with equal ones share compiled code, as a rule."""
    steps = {opcode for opcode, _ in instructions(problem.program)} & {KEY_MODULO, DIFF_MODULO}
    widths = (problem.head_dim, problem.head_dim_v)
    return kernel.name, problem.dtype, widths, problem.features, bool(steps)


def shares(
    problems: Sequence[AttentionProblem], kernels: Sequence[str | Kernel] | None
) -> list[float]:
    """How the problems' times relate where code is compiled for each: see `_NEW_CODE_SHARE`."""
    seen: set[tuple[object, ...]] = set()
    found = []
    for problem in problems:
        codes = {shared_code(one, problem) for one in candidates(problem, kernels)[0]}
        found.append(1.0 if codes <= seen else _NEW_CODE_SHARE)
        seen |= codes
    return found
