"""Compile everything before anything is timed, in many processes at once.

Kernels compiled by a process stay on disk: Triton's, CuPy's, Inductor's and flash-attn-4's caches.
Processes run every contender of every row once; the measuring process then loads what they left. A
failure here is none of the benchmark's results: the contender fails again there. But one that
hangs, or takes its process with it, is not let into the measuring process.

No queues and no pool: a process that is killed while it holds a queue's lock stops all of them.
Runs are taken from a shared counter, and what became of each stands in shared memory.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.context import SpawnProcess

    import torch

    from portattn.bench.workloads import Workload

HUNG_SECONDS = 90
_CONTEXT_BYTES = 1 << 30  # of a process on the GPU before it allocates anything
_MAX_PROCESSES = 16
_END_SECONDS = 5.0
_DONE, _CRASHED = -1.0, -2.0
Task = tuple["Workload", str, bool]


@dataclasses.dataclass(frozen=True, slots=True)
class WarmUp:
    """What the warm-up found.

    Attributes:
        left: runs that were not done in time.
        dangerous: (row, contender) -> why it must not run in the measuring process: it hung, or
            it took its process with it.
    """

    left: int
    dangerous: dict[tuple[str, str], str]


@dataclasses.dataclass(frozen=True, slots=True)
class Shared:
    """What the processes share.

    Attributes:
        next: how many runs were begun.
        states: for each run 0, `time.time` when it began, or how it ended.
        owners: for each run that was begun the process that has it.
    """

    next: Any
    states: Any
    owners: Any


def processes_for(workloads: Sequence[Workload], device: torch.device, tasks: int) -> int:
    """How many processes fit: cores, tasks, and four times the largest row's tensors each."""
    import torch

    most = max(min(len(os.sched_getaffinity(0)), tasks, _MAX_PROCESSES), 1)
    if device.type != "cuda":
        return most
    free, _ = torch.cuda.mem_get_info(device)
    largest = max(workload.total_bytes() for workload in workloads)
    fitting = int(0.8 * free) // (_CONTEXT_BYTES + 4 * largest)
    return max(min(fitting, most), 1)


def fill_caches(
    workloads: Sequence[Workload],
    kernels: Sequence[str],
    peers: Sequence[str],
    device: torch.device,
    seconds: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WarmUp:
    """Run every contender of every row once in other processes.

    Args:
        workloads: the rows.
        kernels, peers: names of contenders.
        device: a torch device.
        seconds: give up after this; the processes are ended.
        progress: told how many of how many runs are done.
    """
    # Row by row: the first ones matter most, and rows after them mostly need the same kernels.
    names = [*reversed(peers), *kernels]
    tasks = [(workload, name, name in kernels) for workload in workloads for name in names]
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    shared = Shared(
        context.Value("i", 0),
        context.Array("d", len(tasks), lock=False),
        context.Array("i", len(tasks), lock=False),
    )

    def begin() -> SpawnProcess:
        process = context.Process(target=work, args=(tasks, str(device), shared), daemon=True)
        process.start()
        return process

    count = processes_for(workloads, device, len(tasks))
    processes: list[SpawnProcess] = []
    hung: set[int] = set()
    try:
        while time.monotonic() < end:
            processes = [one for one in processes if not _ended(one, shared, hung)]
            open_runs = sum(state >= 0 for state in shared.states) - len(hung)
            progress(len(tasks) - open_runs, len(tasks))
            if open_runs == 0:
                break
            if len(processes) < count and shared.next.value < len(tasks):
                processes.append(begin())
            else:
                time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
        for process in processes:  # what they hold on the GPU goes with them
            process.join(_END_SECONDS)
    return WarmUp(sum(state >= 0 for state in shared.states), _dangerous(tasks, shared, hung))


def _ended(process: SpawnProcess, shared: Shared, hung: set[int]) -> bool:
    """Whether a process is over, and note what it took with it; end it if it hangs."""
    runs = [
        index
        for index, (state, owner) in enumerate(zip(shared.states, shared.owners, strict=True))
        if state > 0 and owner == process.pid and index not in hung
    ]
    if not process.is_alive():
        for index in runs:
            shared.states[index] = _CRASHED
        return True
    if any(shared.states[index] < time.time() - HUNG_SECONDS for index in runs):
        hung.update(runs)
        process.kill()
        return True
    return False


def _dangerous(
    tasks: Sequence[Task], shared: Shared, hung: set[int]
) -> dict[tuple[str, str], str]:
    why = {index: f"did not finish in {HUNG_SECONDS} s of the warm-up" for index in hung}
    why |= {
        index: "crashed in the warm-up, and its process with it"
        for index, state in enumerate(shared.states)
        if state == _CRASHED
    }
    return {(tasks[index][0].name, tasks[index][1]): text for index, text in why.items()}


def work(tasks: Sequence[Task], device: str, shared: Shared) -> None:
    """One process: runs, one after another, until none is left. One compiler, on one core."""
    import torch

    torch.set_num_threads(1)
    while True:
        with shared.next:
            index = shared.next.value
            shared.next.value += 1
        if index >= len(tasks):
            return
        shared.owners[index] = os.getpid()
        shared.states[index] = time.time()
        workload, name, is_own = tasks[index]
        problem = attempt(workload, name, is_own, device)
        if problem is not None and _is_lost(device):
            # Nothing else can run on the GPU in this process: another takes its place.
            print(f"warm-up: {workload.name}: {name}: {problem}", file=sys.stderr, flush=True)
            os._exit(1)
        shared.states[index] = _DONE


def _is_lost(device: str) -> bool:
    """Whether an error took the process's use of the GPU with it."""
    import torch

    if not device.startswith("cuda"):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def attempt(workload: Workload, name: str, is_own: bool, device: str) -> str | None:
    """One contender, compiled and run; what went wrong, or None."""
    import torch

    from portattn.bench import contender, data, peers

    try:
        with torch.no_grad():
            made = data.Data(workload, torch.device(device))
            one = contender.own(name, made) if is_own else peers.peer(name, made)
            one.call()
            if one.fresh is not None:
                one.fresh(0)
            if workload.beside_dense and is_own:
                contender.own(name, made, is_dense=True).call()
            if made.device.type == "cuda":
                torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        contender.forget_compiled()
    torch.cuda.empty_cache()  # other processes need the memory
    return None
