"""A tuner to be killed: one life after the other, forked from a process that imported everything.

``python -m tests.tuner.hunted``: each line of standard input is an order, a database and a seed.
What a life is about to measure and what the store has acknowledged is said on standard output,
which outlives it. Compilers and the measuring process are `light_worker`.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import ClassVar

NAME = "hunted_forward"
CASES = ("b1 h2 s64 d16 float32 causal", "b1 h2 s256 d16 float32")
MOST = 40
_WORKER = str(Path(__file__).with_name("light_worker.py"))


def _kernel_types():
    """The kernel that is tuned; it never runs in the tuner's own process."""
    from portattn.backends.base import Config, Kernel

    @dataclasses.dataclass(frozen=True, slots=True)
    class HuntedConfig(Config):
        block: int = 0
        depth: int = 0
        fast: bool = False

    class HuntedKernel(Kernel):
        name: ClassVar[str] = NAME
        backend: ClassVar[str] = "cpu"
        config_type: ClassVar[type[Config]] = HuntedConfig

        def unsupported_reasons(self, problem):
            return []

        def default_config(self, problem):
            return HuntedConfig()

        def search_space(self, problem):
            return {"block": tuple(range(8)), "depth": tuple(range(6)), "fast": (False, True)}

        def infeasible_reasons(self, problem, config):
            return []

        def run(self, inputs, config):
            raise AssertionError("only workers run kernels")

    return HuntedKernel


def live(url: str, seed: int) -> None:
    """One life: tune, and say what happens on standard output."""
    from portattn.device import DeviceKey
    from portattn.tuner import cases, frames, tune
    from portattn.tuner.pool import CompilePool
    from portattn.tuner.remote import RemoteExecutor
    from portattn.tuning_db.store import Store

    class Talking(Store):
        def begin_run(self, **options):
            run_id = super().begin_run(**options)
            _say(event="run", run=run_id)
            return run_id

        def add(self, run_id, subject, measured):
            number = super().add(run_id, subject, measured)
            _say(event="stored", run=run_id, config=measured.params, case=subject.shape)
            return number

    class Watched(RemoteExecutor):
        def attempt(self, kernel, config, best_ns):
            _say(event="try", config=config.to_dict(), case=shape_of(self._case))
            return super().attempt(kernel, config, best_ns)

    from portattn.tuner.work import shape_of

    def start(role):
        return lambda: frames.Peer([sys.executable, "-S", "-E", _WORKER, role])

    device = DeviceKey("cuda", "nvidia", "H100", "sm_90", 132)
    tune(
        [cases.parse(text) for text in CASES],
        budget_seconds=600,
        kernels=[_kernel_types()()],
        store=Talking(url),
        executor=Watched("cpu", "eager_warm", start=start("measure")),
        pool=CompilePool(device, 2, start=start("compile")),
        seed=seed,
        most=MOST,
    )


def _say(**event) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


def _zygote() -> None:
    """Fork one life for each line of standard input, and say when it began and ended."""
    import portattn.tuner
    import portattn.tuner.remote

    assert portattn.tuner
    _say(event="ready")
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(0)  # else what it starts could read the orders
                os.open(os.devnull, os.O_RDONLY)
                live(**order)
                status = 0
            except BaseException as error:
                _say(event="error", text=f"{type(error).__name__}: {error}")
            os._exit(status)
        _say(event="born", pid=child)
        _, status = os.waitpid(child, 0)
        _say(event="died", status=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    _zygote()
