"""Compiling ahead in other processes."""

import multiprocessing
import os
import time

import torch

from portattn.bench import session, warmup, workloads
from portattn.bench.limits import Limits

CPU = torch.device("cpu")
LIMITS = Limits(0.1, 0.01)
WINDOW = workloads.parse("h2 s256 d32 float32 sliding_window:32")


def test_processes_compile_ahead():
    rows = [workloads.parse("h1 s64 d32 float32 causal")]
    seen = []
    found = warmup.fill_caches(
        rows, ["cpu_forward"], ["sdpa"], CPU, 50.0, lambda done, total: seen.append((done, total))
    )
    assert found == warmup.WarmUp(0, {})
    assert seen[-1] == (2, 2)
    assert warmup.attempt(rows[0], "cpu_forward", True, "cpu") is None
    assert "NotApplicableError" in warmup.attempt(rows[0], "sdpa_mask", False, "cpu")


class FakeProcess:
    """Stands for a process: it takes the next run and ends as the test says."""

    def __init__(self, ends, tasks, shared):
        self.ends, self.tasks, self.shared = ends, tasks, shared
        self.pid = id(self)
        self.is_over = self.is_killed = False

    def start(self):
        self.work()

    def work(self):
        while not self.is_over and self.shared.next.value < len(self.tasks):
            index = self.shared.next.value
            self.shared.next.value += 1
            end = self.ends[self.tasks[index][1]]
            self.shared.owners[index] = self.pid
            self.shared.states[index] = warmup._DONE if end == "done" else time.time()
            if end == "hangs":
                self.shared.states[index] -= warmup.HUNG_SECONDS
                return
            self.is_over = end == "crashes"

    def is_alive(self):
        return not self.is_over

    def kill(self):
        self.is_over = self.is_killed = True

    def join(self, seconds):
        pass


def test_what_hangs_or_crashes_ahead_does_not_run(monkeypatch):
    ends = {"cpu_forward": "done", "sdpa": "crashes", "flex": "hangs", "sdpa_mask": "done"}
    begun = []

    class Context:
        def Array(self, kind, count, lock):  # noqa: N802
            return [0] * count

        def Value(self, kind, value):  # noqa: N802
            return type("Value", (), {"value": value})()

        def Process(self, target, args, daemon):  # noqa: N802
            begun.append(FakeProcess(ends, args[0], args[2]))
            return begun[-1]

    monkeypatch.setattr(warmup.multiprocessing, "get_context", lambda kind: Context())
    monkeypatch.setattr(warmup, "processes_for", lambda *arguments: 1)
    others = ["sdpa", "flex", "sdpa_mask"]
    found = warmup.fill_caches([WINDOW], ["cpu_forward"], others, CPU, 5.0)
    assert found.left == 1
    assert [process.is_killed for process in begun] == [True, False, True]
    assert found.dangerous == {
        (WINDOW.name, "sdpa"): "crashed in the warm-up, and its process with it",
        (WINDOW.name, "flex"): f"did not finish in {warmup.HUNG_SECONDS} s of the warm-up",
    }
    one = session.Settings(CPU, ("cpu_forward",), ("sdpa",), 0.001, dangerous=found.dangerous)
    row = session.run_row(WINDOW, one, LIMITS)
    assert row["not_run"] == {"sdpa": "crashed in the warm-up, and its process with it"}


def test_a_process_that_is_killed_does_not_stop_the_others(monkeypatch):
    """Real processes: one is killed in the middle of a run, as for want of memory."""
    context = multiprocessing.get_context("fork")
    shared = warmup.Shared(
        context.Value("i", 0), context.Array("d", 2, lock=False), context.Array("i", 2, lock=False)
    )
    monkeypatch.setattr(warmup, "attempt", lambda *task: os.kill(os.getpid(), 9))
    process = context.Process(target=warmup.work, args=([(WINDOW, "a", False)], "cpu", shared))
    process.start()
    process.join(30)
    assert warmup._ended(process, shared, set())
    assert list(shared.states) == [warmup._CRASHED, 0.0]
