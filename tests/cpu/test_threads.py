"""Threads: any number, from several Python threads at once, after fork.

The last tests do without torch's OpenMP pool.
"""

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch

from portattn import masks
from portattn.backends.cpu.forward import CpuForward, CpuForwardConfig
from portattn.native import library_path
from tests.cpu.cases import Case


@pytest.fixture(autouse=True)
def threads():
    """Restores torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _case():
    return Case.random(1, 4, 2, 600, head_dim=64, mask=masks.causal())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_thread_counts(count):
    """Every count gives the same bits: rows are not cut here."""
    case = _case()
    torch.set_num_threads(1)
    expected, expected_lse = case.run(CpuForward(), CpuForwardConfig())
    torch.set_num_threads(count)
    output, lse = case.check(CpuForward(), CpuForwardConfig())
    assert torch.equal(output, expected)
    assert torch.equal(lse, expected_lse)


def test_callers_at_once():
    """Several Python threads call at the same time with their own tensors."""
    torch.set_num_threads(2)
    cases = [_case() for _ in range(4)]
    expected = [case.run()[0] for case in cases]
    results = [None] * len(cases)

    def work(n):
        for _ in range(5):
            results[n] = cases[n].run()[0]

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)


# The child calls the kernel alone: torch's own operators hang there, waiting for OpenMP threads
# that are gone.
_FORK = """
import os, signal, torch
from portattn import masks
from portattn.backends.base import AttentionInputs
from portattn.backends.cpu.forward import CpuForward, CpuForwardConfig
from tests.cpu.cases import Case
torch.set_num_threads(2)
case = Case.random(1, 4, 2, 600, head_dim=64, mask=masks.causal())
expected = case.run()[0].numpy().tobytes()
output = torch.zeros(1, 4, 600, 64)
inputs = AttentionInputs(
    case.query, case.key, case.value, output, None, case.mask, 0, None, case.scaled(), 0.0, None,
    None, None, False
)
child = os.fork()
if child == 0:
    signal.alarm(60)
    for _ in range(3):
        CpuForward().run(inputs, CpuForwardConfig(64, 48))
    os._exit(0 if output.numpy().tobytes() == expected else 3)
assert os.waitpid(child, 0)[1] == 0
CpuForward().run(inputs, CpuForwardConfig(64, 48))
assert output.numpy().tobytes() == expected
"""


def test_fork():
    """A forked child, whose OpenMP threads are gone, computes with threads of its own."""
    _run_python(_FORK)


_WITHOUT_OPENMP = """
import ctypes, threading
import os
from portattn.backends.cpu import abi
lib = abi.functions()
assert "libgomp" not in open("/proc/self/maps").read()
before = threading.active_count(), len(os.listdir("/proc/self/task"))
rate = lib.portattn_cpu_measure_fma(2, 0.01)
assert rate > 0
assert len(os.listdir("/proc/self/task")) == before[1] + 1, "the own pool has one thread more"
"""


def test_own_pool():
    """Without torch's OpenMP the library's own pool works."""
    # native and abi are loaded without the package's __init__, which imports torch and its
    # libgomp.
    loader = """
import importlib.util, sys, types
for name, path in (("portattn", "portattn"), ("portattn.backends", "backends"),
("portattn.backends.cpu", "backends/cpu")):
    module = types.ModuleType(name)
    module.__path__ = [path]
    sys.modules[name] = module
import portattn.errors
"""
    _run_python(loader + _WITHOUT_OPENMP, PORTATTN_LIBRARY=str(library_path()))


def test_unknown_isa():
    """PORTATTN_CPU_ISA with an unknown name is an error that lists what is allowed."""
    code = """
from portattn.backends.cpu import abi
from portattn.errors import ConfigError
try:
    abi.isa()
except ConfigError as error:
    assert "x86-64-v3" in str(error) and "sse9" in str(error)
else:
    raise AssertionError("no error")
"""
    _run_python(code, PORTATTN_CPU_ISA="sse9")


def _run_python(code, **environment):
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.getcwd(), **environment},
    )


def test_spawned_process():
    """multiprocessing's default for safety works too."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(_sum) == pytest.approx(_sum(), rel=1e-6)


def _sum():
    torch.manual_seed(1)
    return float(_case().run()[0].sum())
