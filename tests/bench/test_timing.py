"""How contenders are timed and what ends them: events, time limits, hung kernels."""

import signal
import time

import pytest
import torch

from portattn.bench import peers, rounds, session, workloads
from portattn.bench.limits import Limits
from portattn.bench.time_limit import TimeLimitError, time_limit

CPU = torch.device("cpu")
LIMITS = Limits(0.1, 0.01)
WINDOW = workloads.parse("h2 s256 d32 float32 sliding_window:32")


def test_a_contender_that_takes_too_long_is_left_out(monkeypatch):
    def never(data, name):
        while True:
            time.sleep(0.01)

    monkeypatch.setitem(peers._CPU, "sdpa", never)
    one = session.Settings(CPU, ("cpu_forward",), ("sdpa", "sdpa_mask"), 0.001, limit_seconds=0.2)
    said = []
    row = session.run_row(WINDOW, one, LIMITS, say=said.append)
    assert row["not_run"] == {"sdpa": "TimeLimitError: did not finish in 0.2 s"}
    assert set(row["contenders"]) == {"cpu_forward", "sdpa_mask"}
    assert said[1] == f"{WINDOW.name}: sdpa"
    row = session.run_row(WINDOW, one, LIMITS, time.monotonic())
    assert row["not_run"]["cpu_forward"] == "TimeLimitError: no time was left"


def test_a_time_limit_ends_with_its_block():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeLimitError), time_limit(0.01):
        time.sleep(30)
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGALRM) is before


class FakeEvent:
    """Stands for a CUDA event: the host's clock when it is recorded."""

    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3

    def query(self):
        return True


def test_the_cuda_timer_overwrites_the_cache_before_each_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(rounds, "_FLUSH_BYTES", 16)
    timer = rounds.CudaTimer(CPU)
    seen = []

    def call():
        seen.append(int(timer._flush.sum()))
        timer._flush.fill_(1)

    assert timer.rounds({"one": call, "two": call}, 3)["two"].rounds == 3
    assert seen == [0] * 6
    assert timer.once(lambda: time.sleep(0.001)) >= 1.0


def test_a_hung_call_is_given_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    rounds.wait(0.01)
    monkeypatch.setattr(FakeEvent, "query", lambda self: False)
    with pytest.raises(rounds.HungError, match="did not finish in 0 s"):
        rounds.wait(0.01)
    assert not rounds.is_lost(CPU)


def test_a_row_ends_where_a_kernel_hangs(monkeypatch):
    def hang(one, data, reference):
        raise rounds.HungError("did not finish in 20 s")

    monkeypatch.setattr(session, "_run_and_check", hang)
    row = session.run_row(
        WINDOW, session.Settings(CPU, ("cpu_forward",), ("sdpa",), 0.001), LIMITS
    )
    assert row["error"] == "HungError: cpu_forward did not finish in 20 s"
