"""End to end on the CPU kernels: tune, then a new process runs what was stored and says so."""

import json
import os
import subprocess
import sys

import torch

import portattn
from portattn.backends.cpu.forward import CpuForward
from portattn.device import device_key
from portattn.tuner import cases, tune
from portattn.tuner.timers import Timer
from portattn.tuning_db import lookup

NEW_PROCESS = """
import json, torch, portattn, warnings
from portattn.tuning_db import TuningDatabaseWarning
warnings.simplefilter("error", TuningDatabaseWarning)
q, k, v = (torch.randn(1, 2, 96, 32) for _ in range(3))
told = portattn.explain(q, k, v, is_causal=True)
right = portattn.attention(q, k, v, is_causal=True, backend="reference")
error = portattn.attention(q, k, v, is_causal=True) - right
print(json.dumps([told.kernel, told.config.to_dict(), told.rung, float(error.abs().max())]))
"""


def in_new_process(repository, database):
    environment = {**os.environ, "PORTATTN_DB": str(database), "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_small_budget_tunes_and_a_new_process_uses_it(store, repository):
    case = cases.parse("b1 h2 s100 d32 float32 causal")
    report = tune([case], budget_seconds=60, most=4, store=store)
    kernels = {kernel.name: kernel for kernel in report.problems[0].kernels}
    forward = kernels["cpu_forward"]
    assert forward.tried >= 2
    assert forward.rejected == ()
    assert forward.best_ns <= forward.default_ns
    found = lookup.find("cpu_forward", case.problem, device_key("cpu"))
    assert found == ({} if forward.kept_default else forward.params, "exact")
    kernel, config, rung, error = in_new_process(repository, store.location.path)
    assert (kernel, rung) == ("cpu_forward", "exact")
    assert forward.kept_default or config == forward.params
    assert error < 1e-5


class Watched(CpuForward):
    """Remembers which config ran last."""

    last = None

    def run(self, inputs, config):
        super().run(inputs, config)
        Watched.last = config


class LikesSmallTiles(Timer):
    """The winner then differs from the default, whatever this machine is."""

    def sample(self, run, repeats):
        run()
        return 10**6 * (Watched.last.block_q + Watched.last.block_k + Watched.last.head_group)


def test_a_config_other_than_the_default_is_used_too(store, repository):
    case = cases.parse("b1 h2 s100 d32 float32 causal")
    report = tune(
        [case],
        budget_seconds=60,
        most=60,
        kernels=[Watched()],
        store=store,
        timer=LikesSmallTiles(),
    )
    forward = report.problems[0].kernels[0]
    assert not forward.kept_default
    kernel, config, rung, error = in_new_process(repository, store.location.path)
    assert (kernel, config, rung) == ("cpu_forward", forward.params, "exact")
    assert error < 1e-5
    # This process saw it as well: tune() makes it forget what it had loaded.
    q, k, v = (torch.randn(1, 2, 96, 32) for _ in range(3))
    assert portattn.explain(q, k, v, is_causal=True).config.to_dict() == forward.params
