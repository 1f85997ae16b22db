"""Compiling ahead in other processes."""

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
    assert warmup._run_once(rows[0], "cpu_forward", True, "cpu", 0) is None
    assert "NotApplicableError" in warmup._run_once(rows[0], "sdpa_mask", False, "cpu", 0)


class SpyPool:
    """Stands for a pool of processes: runs end as the test says."""

    def __init__(self, states, ends):
        self.states, self.ends = states, ends

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def apply_async(self, function, arguments):
        *_, name, _, _, index = arguments
        end = self.ends[name]
        self.states[index] = end if isinstance(end, float) else 1.0
        return type("Run", (), {"ready": lambda self: end == "done"})()


def test_what_hangs_or_crashes_ahead_does_not_run(monkeypatch):
    ends = {"cpu_forward": "done", "sdpa": warmup._CRASHED, "flex": 1.0, "sdpa_mask": 0.0}

    class Context:
        def Array(self, kind, count, lock):  # noqa: N802
            self.states = [0.0] * count
            return self.states

        def Pool(self, count, prepare, arguments):  # noqa: N802
            return SpyPool(self.states, ends)

    monkeypatch.setattr(warmup.multiprocessing, "get_context", lambda kind: Context())
    others = ["sdpa", "flex", "sdpa_mask"]
    found = warmup.fill_caches([WINDOW], ["cpu_forward"], others, CPU, 0.3)
    assert found.left == 2
    assert found.dangerous == {
        (WINDOW.name, "sdpa"): "crashed in the warm-up, and its process with it",
        (WINDOW.name, "flex"): "did not finish in 60 s of the warm-up",
    }
    one = session.Settings(CPU, ("cpu_forward",), ("sdpa",), 0.001, found.dangerous)
    row = session.run_row(WINDOW, one, LIMITS)
    assert row["not_run"] == {"sdpa": "crashed in the warm-up, and its process with it"}
