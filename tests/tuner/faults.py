"""A kernel with planted faults, and a worker process that knows it: ``python faults.py ROLE``."""

import dataclasses
import os
import signal
import sys
import time
from typing import ClassVar

import torch

from portattn.backends import registry
from portattn.backends.base import Config, Kernel

NAME = "faulty_forward"
ENTRY = ("cpu", "faults", "FaultyKernel", ())


@dataclasses.dataclass(frozen=True, slots=True)
class FaultyConfig(Config):
    size: int = 1
    fault: str = "none"


class FaultyKernel(Kernel):
    """Right by the reference unless its config says otherwise; larger sizes are faster."""

    name: ClassVar[str] = NAME
    backend: ClassVar[str] = "cpu"
    config_type: ClassVar[type[Config]] = FaultyConfig
    faults: ClassVar[tuple[str, ...]] = ("none",)
    runs: ClassVar[int] = 0

    def unsupported_reasons(self, problem):
        return []

    def default_config(self, problem):
        return FaultyConfig()

    def search_space(self, problem):
        return {"size": (1, 2), "fault": self.faults}

    def infeasible_reasons(self, problem, config):
        return []

    def run(self, inputs, config):
        reference = registry.kernel("reference")
        reference.run(inputs, reference.config_from_dict({"dtype": "float64"}))
        time.sleep(0.004 / config.size)
        self.fail(inputs, config.fault)

    def fail(self, inputs, fault):
        if fault in SPOILED:
            SPOILED[fault](inputs)
        elif fault == "raises":
            raise RuntimeError("illegal instruction")
        elif fault == "huge":
            torch.ones(10 << 30, dtype=torch.uint8)
        elif fault in ENDED:
            ENDED[fault]()


def add_to_last_row(inputs):
    inputs.output[..., -1, 0] += 0.01


def come_first_or_not(inputs):
    FaultyKernel.runs += 1
    if FaultyKernel.runs % 4 == 0:
        add_to_last_row(inputs)


SPOILED = {
    "wrong": add_to_last_row,
    "nan": lambda inputs: inputs.output[0, 0, 0, :1].fill_(float("nan")),
    "oob": lambda inputs: inputs.output.untyped_storage().__setitem__(5, 0),
    "race": come_first_or_not,
}
ENDED = {
    "abort": os.abort,
    "exit": lambda: os._exit(0),
    "sys_exit": lambda: sys.exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "slow_compile": lambda: time.sleep(61),
    "hang": lambda: time.sleep(600),
}


class FaultyCompiler:
    """In place of `worker.CompileWorker`: the config says how it goes."""

    def __init__(self, frame):
        self.device = frame["device"]["name"]

    def answer(self, frame):
        config = frame["config"]
        if config["fault"] == "raises":
            return {"status": "compile_error", "reason": "RuntimeError: no such register"}
        FaultyKernel().fail(None, config["fault"])
        return {"status": "ok", "code": f"{self.device} {config['size']}", "compile_ns": 5}


if __name__ == "__main__":
    from portattn.tuner import worker

    registry.KERNELS[NAME] = ENTRY
    worker._ROLES["compile"] = FaultyCompiler
    worker.main(sys.argv[1])
