"""The driver as it runs on a GPU, with the device, the compilers and the clock replaced."""

import types

import pytest
import torch

from portattn.backends.cupy.device import device_properties
from portattn.backends.triton.limits import device_limits
from portattn.device import _gpu_key, device_key
from portattn.tuner import cases, tune
from portattn.tuner.estimate import estimate
from portattn.tuner.executor import Attempt, Executor
from portattn.tuner.pool import Compilation
from portattn.tuner.presets import PRESETS, preset
from portattn.tuner.verify import Verdict
from portattn.tuning_db import lookup

KERNELS = ["cupy_forward_sm90", "triton_forward_hopper", "cupy_forward_sm80"]
DECODE = ["cupy_decode", "triton_decode"]


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    """This process sees an H100 that it cannot use."""
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=232448,
        regs_per_multiprocessor=65536,
        L2_cache_size=50 << 20,
        total_memory=80 << 30,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    caches = (device_limits, device_properties, _gpu_key)
    for cache in caches:
        cache.cache_clear()
    yield device_key("cuda:0")
    for cache in caches:
        cache.cache_clear()


class Surface(Executor):
    """Every config is right, and takes a time that its fields tell."""

    policy = "eager_cold"

    def __init__(self):
        self.tried = []

    def begin(self, case):
        self.case = case

    def time_ns(self, config):
        fields = config.to_dict()
        best = {"block_k": 64, "num_stages": 3, "head_group": 8}
        return 10_000 * (100 + sum(fields[name] != value for name, value in best.items()))

    def attempt(self, kernel, config, best_ns):
        self.tried.append((kernel.name, config))
        return Attempt(Verdict("ok"), (self.time_ns(config),) * 5)

    def rounds(self, entries, seconds, *, min_rounds):
        return [[self.time_ns(entry.config)] * min_rounds for entry in entries]

    def close(self):
        pass


class Compilers:
    """As `CompilePool`, at once; configs are equal on the device if they differ in `same` only."""

    count, problem, finished = 3, "", None

    def __init__(self, same=(), fails=lambda config: False):
        self.same, self.fails, self.jobs = same, fails, []

    def submit(self, case, kernel, config, priority):
        job = Compilation(case.to_json(), kernel.name, config.to_dict())
        fields = {name: value for name, value in job.config.items() if name not in self.same}
        job.status, job.code, job.compile_ns = "ok", f"{kernel.name} {fields}", 7
        if self.fails(config):
            job.status, job.reason = "compile_error", "ptxas has enough"
        job.ready.set()
        self.jobs.append((priority, job))
        return job

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def run(store, texts, pool, **options):
    executor = Surface()
    report = tune(
        [cases.parse(text, "cuda:0") for text in texts],
        budget_seconds=60,
        device="cuda:0",
        store=store,
        executor=executor,
        pool=pool,
        **options,
    )
    return report, executor


def test_configs_are_compiled_ahead_and_winners_tried_early(store, h100):
    pool = Compilers()
    texts = ["b1 h16 s4096 d128 bfloat16 causal", "b1 h16 s1024 d128 bfloat16 causal"]
    report, executor = run(store, texts, pool, kernels=["cupy_forward_sm90"], most=60)
    first, second = (problem.kernels[0] for problem in report.problems)
    assert first.best_ns == second.best_ns == 1_000_000
    assert first.tried == second.tried == 60
    assert [priority for priority, _ in pool.jobs].count(1) == 60
    # While the first problem is measured, the second's first configs are under way.
    order = [priority for priority, _ in pool.jobs]
    assert order.index(1) < len(order) - 1 - order[::-1].index(0)
    third, executor = run(
        store, ["b2 h8 s2048 d128 bfloat16 causal"], Compilers(), kernels=["cupy_forward_sm90"],
        most=3,
    )  # fmt: skip
    assert executor.tried[1][1].to_dict() == first.params
    assert third.problems[0].kernels[0].params == first.params
    assert lookup.find("cupy_forward_sm90", third_problem(), h100).rung == "exact"


def third_problem():
    return cases.parse("b2 h8 s2048 d128 bfloat16 causal", "cuda:0").problem


def test_what_does_the_same_is_measured_once(store):
    pool = Compilers(same=("head_group", "num_warps"))
    report, executor = run(store, ["b1 h4 s512 d256 float16"], pool, kernels=["cupy_forward_sm80"])
    kernel = report.problems[0].kernels[0]
    codes = {job.code for _, job in pool.jobs}
    assert kernel.tried == len(executor.tried) == len(codes) < kernel.feasible == len(pool.jobs)


def test_what_does_not_compile_is_rejected_and_never_run(store):
    pool = Compilers(fails=lambda config: config.num_stages == 3)
    report, executor = run(
        store, ["b1 h4 s512 d64 float16"], pool, kernels=["cupy_forward_sm80"], most=50
    )
    kernel = report.problems[0].kernels[0]
    rejected = {(params["num_stages"], status) for params, status, _ in kernel.rejected}
    assert rejected == {(3, "compile_error")}
    assert all(config.num_stages != 3 for _, config in executor.tried)
    assert kernel.params["num_stages"] != 3


def test_kernel_objects_are_refused_where_they_run_elsewhere(fake_kernel, store):
    from portattn.errors import TuningError

    with pytest.raises(TuningError, match="give names of the registry"):
        tune([], device="cuda:0", kernels=[fake_kernel()], store=store)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_counted_without_running(name, h100):
    names = DECODE if name == "decode" else KERNELS
    problems = preset(name, "cuda:0")
    assert len({one.label for one in estimate(problems, h100, names, 10)}) == len(problems)
    first, *others = estimate(problems, h100, names, 10)
    assert {kernel.name for kernel in first.kernels} == set(names)
    for kernel in first.kernels:
        assert kernel.tried == 10
        assert 0 < kernel.feasible <= kernel.declared + 1
        assert kernel.feasible + sum(kernel.infeasible.values()) >= kernel.declared
    if name == "forward":  # the same code again: nothing to compile
        assert others[0].kernels[0].seconds < first.kernels[0].seconds
        assert len(problems) == 18
