"""Compile everything before anything is timed, in many processes at once.

Kernels compiled by a process stay on disk: Triton's, CuPy's, Inductor's and flash-attn-4's caches.
A pool of processes runs every contender of every row once; the measuring process then loads what
they left. A failure here is none of the benchmark's results: the contender fails again there. But
one that hangs, or takes its process with it, is not let into the measuring process.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.sharedctypes import SynchronizedArray

    import torch

    from portattn.bench.workloads import Workload

_CONTEXT_BYTES = 1 << 30  # of a process on the GPU before it allocates anything
_MAX_PROCESSES = 16
_HUNG_SECONDS = 60
_CRASHED = -1.0
# Of a process of the pool: the array that it shares with the others.
_states: list[SynchronizedArray[float] | None] = []


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
    # For each run: 0, when it began, or _CRASHED. A process that dies takes its result with it.
    states = context.Array("d", len(tasks), lock=False)
    count = processes_for(workloads, device, len(tasks))
    with context.Pool(count, _prepare_process, (states,)) as pool:
        pending = [
            pool.apply_async(_run_once, (*task, str(device), index))
            for index, task in enumerate(tasks)
        ]
        while True:
            open_runs = [
                index
                for index, one in enumerate(pending)
                if not one.ready() and states[index] != _CRASHED
            ]
            hung = [i for i in open_runs if 0 < states[i] < time.time() - _HUNG_SECONDS]
            progress(len(tasks) - len(open_runs), len(tasks))
            if len(open_runs) == len(hung) or time.monotonic() >= end:
                break
            time.sleep(0.1)
    why = {index: f"did not finish in {_HUNG_SECONDS} s of the warm-up" for index in hung}
    why |= {
        index: "crashed in the warm-up, and its process with it"
        for index in range(len(tasks))
        if states[index] == _CRASHED
    }
    dangerous = {(tasks[i][0].name, tasks[i][1]): text for i, text in why.items()}
    return WarmUp(len(open_runs), dangerous)


def _prepare_process(states: SynchronizedArray[float] | None = None) -> None:
    """One process is one compiler, on one core."""
    import torch

    torch.set_num_threads(1)
    _states.append(states)


def _run_once(workload: Workload, name: str, is_own: bool, device: str, index: int) -> str | None:
    """One contender, compiled and run; what went wrong, or None."""
    states = _states[-1] if _states else None
    if states is not None:
        states[index] = time.time()
    problem = _attempt(workload, name, is_own, device)
    if problem is not None and _is_lost(device):
        # Nothing else can run on the GPU in this process: the pool starts another.
        print(f"warm-up: {workload.name}: {name}: {problem}", file=sys.stderr, flush=True)
        if states is not None:
            states[index] = _CRASHED
        os._exit(1)
    return problem


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


def _attempt(workload: Workload, name: str, is_own: bool, device: str) -> str | None:
    import torch

    from portattn.bench import contender, data, peers

    try:
        with torch.no_grad():
            made = data.Data(workload, torch.device(device))
            one = contender.own(name, made) if is_own else peers.peer(name, made)
            one.call()
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
