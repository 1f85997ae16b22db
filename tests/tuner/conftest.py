"""A kernel with a known time surface and planted faults, and a timer that reads the surface."""

import dataclasses
from typing import ClassVar

import pytest

from portattn.backends import registry
from portattn.backends.base import Config, Kernel
from portattn.tuner import cases
from portattn.tuner.timers import Timer
from portattn.tuning_db import lookup
from portattn.tuning_db.store import Store


@dataclasses.dataclass(frozen=True, slots=True)
class FakeConfig(Config):
    block_q: int = 64
    block_k: int = 64
    unroll: bool = False
    fault: str = "none"


class FakeKernel(Kernel):
    """Right by the reference; how long it "takes" is `surface`. Faults: see run()."""

    name: ClassVar[str] = "fake_forward"
    backend: ClassVar[str] = "cpu"
    config_type: ClassVar[type[Config]] = FakeConfig

    def __init__(self, faults=("none",)):
        self.faults = faults
        self.last_ns = 0
        self.runs = {}
        self.answers = {}

    def unsupported_reasons(self, problem):
        return ["wants head_dim 16"] if problem.head_dim != 16 else []

    def default_config(self, problem):
        return FakeConfig()

    def search_space(self, problem):
        return {
            "block_q": (16, 32, 64, 128),
            "block_k": (16, 32, 64, 128),
            "unroll": (False, True),
            "fault": self.faults,
        }

    def infeasible_reasons(self, problem, config):
        return (
            ["tile has more than 8192 elements"] if config.block_q * config.block_k > 8192 else []
        )

    def surface(self, config):
        """ns; the optimum is block_q 128, block_k 32, unrolled."""
        time = (
            1000 + abs(config.block_q - 128) + 2 * abs(config.block_k - 32) - 100 * config.unroll
        )
        return 10_000 * time // (2 if config.fault != "none" else 1)  # every fault looks fast

    def run(self, inputs, config):
        reference = registry.kernel("reference")
        self.runs[config] = self.runs.get(config, 0) + 1
        if config.fault == "raises":
            raise RuntimeError("illegal instruction")
        if config.fault == "out_of_memory":
            raise MemoryError("too much")
        answer = self.answers.get(id(inputs))
        if answer is None:
            reference.run(inputs, reference.config_from_dict({"dtype": "float64"}))
            self.answers[id(inputs)] = (
                inputs,
                inputs.output.clone(),
                inputs.lse if inputs.lse is None else inputs.lse.clone(),
            )
        else:
            inputs.output.copy_(answer[1])
            if inputs.lse is not None:
                inputs.lse.copy_(answer[2])
        self.spoil(inputs, config)
        self.last_ns = self.surface(config)

    def spoil(self, inputs, config):
        """What a wrong kernel leaves."""
        if config.fault == "wrong":
            inputs.output[..., -1, 0] += 0.01
        if config.fault == "unwritten":
            inputs.output[:, :, inputs.output.shape[2] // 2] = float("nan")
        if config.fault == "oob":
            inputs.output.untyped_storage()[5] = 0
        if config.fault == "changes_inputs":
            inputs.key[0, 0, 0, 0] += 1
        if config.fault == "wrong_at_edges" and inputs.q_offset < 0:
            inputs.output[:, :, 0] = 1
        if config.fault == "wrong_when_ragged" and inputs.query.shape[2] % 2:
            inputs.output.mul_(1.001)


class FakeTimer(Timer):
    """Reads the surface of whichever kernel ran."""

    def __init__(self, *kernels):
        self.kernels = kernels

    def sample(self, run, repeats):
        for kernel in self.kernels:
            kernel.last_ns = 0
        run()
        return max(kernel.last_ns for kernel in self.kernels)


@pytest.fixture
def fake_kernel():
    return FakeKernel


@pytest.fixture
def fake_config():
    return FakeConfig


@pytest.fixture
def fake_timer():
    return FakeTimer


@pytest.fixture
def case():
    return cases.parse("b1 h2 s64 d16 float32 causal")


@pytest.fixture
def store(tmp_path, monkeypatch):
    path = tmp_path / "tuning.db"
    monkeypatch.setenv("PORTATTN_DB", str(path))
    yield Store()
    monkeypatch.undo()
    lookup.reload()
