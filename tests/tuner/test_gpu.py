"""The tuner on a real GPU."""

import pytest

from portattn.device import device_key
from portattn.tuner import cases, timers, tune
from portattn.tuning_db import lookup


@pytest.mark.gpu
@pytest.mark.parametrize(
    "problem",
    [
        "b1 h4 s1024 d64 float16 causal",
        "b1 h4 kv2 s500 d128 bfloat16 longformer:64:16 lse",
        "b2 h4 sq1 sk2048 d64 bfloat16 offset:end",
    ],
)
def test_a_gpu_is_tuned(problem, store):
    case = cases.parse(problem, "cuda")
    report = tune([case], budget_seconds=40, device="cuda", store=store).problems[0]
    assert report.fastest is not None
    for kernel in report.kernels:
        assert kernel.params is not None, kernel.rejected
        assert kernel.best_ns <= kernel.default_ns
        assert lookup.find(kernel.name, case.problem, device_key("cuda")).rung == "exact"


@pytest.mark.gpu
def test_events_tell_the_time():
    import torch

    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    timer = timers.timer_for("cuda")
    timer.sample(lambda: a @ a, 3)
    assert 50_000 < timer.sample(lambda: a @ a, 10) < 50_000_000
