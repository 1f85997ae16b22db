"""Candidates that hang, crash or kill their process, and compilers that do."""

import os
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy

from portattn.backends import registry
from portattn.device import DeviceKey
from portattn.tuner import cases, frames, tune
from portattn.tuner.executor import DeviceLostError, Entry
from portattn.tuner.pool import CompilePool
from portattn.tuner.remote import RemoteExecutor
from portattn.tuning_db import schema

HERE = Path(__file__).parent
H100 = DeviceKey("cuda", "nvidia", "H100", "sm_90", 132, 0, 232448, 65536, 50 << 20, 0, 80 << 30)


@pytest.fixture
def faults(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import faults

    monkeypatch.setitem(registry.KERNELS, faults.NAME, faults.ENTRY)
    registry.kernel.cache_clear()
    yield faults
    registry.kernel.cache_clear()


def start(role):
    return lambda: frames.Peer(
        [sys.executable, str(HERE / "faults.py"), role], {"OMP_NUM_THREADS": "1"}
    )


@pytest.fixture
def executor():
    made = RemoteExecutor("cpu", "eager_warm", attempt_seconds=4, start=start("measure"))
    yield made
    made.close()


def test_every_planted_fault_is_rejected_for_its_reason(
    faults, executor, case, store, monkeypatch
):
    wanted = {
        "wrong": "wrong_result",
        "nan": "nan",
        "oob": "oob",
        "race": "wrong_result",
        "huge": "resource",
        "raises": "launch_error",
        "abort": "crash",
        "exit": "crash",
        "sys_exit": "crash",
        "kill": "crash",
        "hang": "run_timeout",
    }
    monkeypatch.setattr(faults.FaultyKernel, "faults", tuple(wanted))
    # A fault of size 1 only: each ends its process, and a process takes seconds to start.
    monkeypatch.setattr(
        faults.FaultyKernel,
        "infeasible_reasons",
        lambda self, problem, config: [] if config.size == 1 or config.fault == "none" else ["x"],
    )
    options = {"budget_seconds": 120, "kernels": [faults.NAME], "executor": executor}
    report = tune([case], store=store, **options).problems[0].kernels[0]
    found = {params["fault"]: status for params, status, _ in report.rejected}
    assert found == wanted
    reasons = {params["fault"]: reason for params, _, reason in report.rejected}
    assert "signal 6" in reasons["abort"]
    assert "signal 9" in reasons["kill"]
    assert "no answer in 4 s" in reasons["hang"]
    assert "a race?" in reasons["race"]
    assert "allocate" in reasons["huge"]
    assert report.params == {"size": 1, "fault": "none"}
    with store.transaction() as connection:
        rows = connection.execute(sqlalchemy.select(schema.quarantine)).mappings().all()
    # What was too large for this device's memory may fit another time.
    assert len(rows) == len(wanted) - 1
    again = tune([case], store=store, **options).problems[0].kernels[0]
    assert again.tried == again.feasible == 2  # the default, and "huge"
    assert again.infeasible["it failed before on such a device: it is in quarantine"] == 10


def test_finals_in_a_process_that_dies_are_tried_again_then_given_up(faults, executor, case):
    kernel = faults.FaultyKernel()
    executor.begin(case)
    good = Entry(kernel, faults.FaultyConfig(), 4_000_000)
    assert [len(one) for one in executor.rounds([good], 0, min_rounds=2)] == [2]
    bad = Entry(kernel, faults.FaultyConfig(fault="exit"), 4_000_000)
    with pytest.raises(DeviceLostError, match="exited with 0"):
        executor.rounds([good, bad], 0, min_rounds=2)


def test_a_compiler_that_fails_is_that_configs_verdict(faults, case):
    kernel, config = faults.FaultyKernel(), faults.FaultyConfig
    with CompilePool(H100, 2, seconds=5, start=start("compile")) as pool:
        jobs = {
            fault: pool.submit(case, kernel, config(fault=fault), 0)
            for fault in ("none", "raises", "kill", "hang", "slow_compile")
        }
        same = pool.submit(case, kernel, config(), 1)
        for job in (*jobs.values(), same):
            assert job.ready.wait(60)
        found = {fault: job.status for fault, job in jobs.items()}
        assert found == {
            "none": "ok",
            "raises": "compile_error",
            "kill": "crash",
            "hang": "compile_timeout",
            "slow_compile": "compile_timeout",
        }
        assert same.code == jobs["none"].code == "H100 1"
        waiting = pool.submit(case, kernel, config(fault="hang"), 0)
        time.sleep(0.1)
        started = time.monotonic()
    assert time.monotonic() - started < 3  # closing waits for no compiler
    assert waiting.status != "ok"


def test_a_process_ends_with_its_whole_group(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('{\"child\": %d}' % child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    peer = frames.Peer([sys.executable, str(script)])
    child = peer.ask({}, 30)["child"]
    peer.end()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{child}/stat").exists():
        state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            break  # killed; whoever adopted it has not looked yet
        time.sleep(0.02)
    else:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    with pytest.raises(frames.PeerLostError):
        peer.ask({}, 1)


def test_what_is_compiled_ahead_is_what_the_kernels_load(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    case = cases.parse("b2 h8 kv2 sq1 sk512 d64 float16 kv_lengths", "cuda:0")
    kernel, triton = registry.kernel("cupy_decode"), registry.kernel("triton_decode")
    default = kernel.config_type()
    with CompilePool(H100, 1) as pool:
        first = pool.submit(case, kernel, default, 0)
        broken = pool.submit(case, kernel, kernel.config_type(block_k=17), 0)
        other = pool.submit(case, triton, triton.config_type(), 0)
        for job in (first, broken, other):
            assert job.ready.wait(120)
    assert first.status == other.status == "ok", (first.reason, other.reason)
    assert broken.status == "compile_error"
    assert len({first.code, other.code}) == 2
    assert [path.read_bytes()[:4] for path in tmp_path.rglob("*.cubin")].count(b"\x7fELF") == 2
