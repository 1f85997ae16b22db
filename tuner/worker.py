"""The processes of the tuner: ``python -m portattn.tuner.worker compile`` or ``measure``.

Each answers one JSON frame with one, until its input ends. ``compile`` never touches a device;
``measure`` holds one.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from portattn.backends import registry
from portattn.tuner import cases, frames, limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from portattn.backends.base import Config, Kernel
    from portattn.tuner.frames import Frame

_MAX_TEXT = 1500
_COMPILER_BYTES = 8 << 30
_NICE = 5  # of compilers: the measuring process must not wait for a core


class CompileWorker:
    """Compiles for the device that the first frame names."""

    def __init__(self, frame: Frame) -> None:
        import torch

        from portattn.tuner.offline import Offline, device_from_json

        torch.set_num_threads(1)  # one process is one compiler, on one core
        os.nice(_NICE)
        limits.bound("cpu", _COMPILER_BYTES)
        self._offline = Offline(device_from_json(frame["device"]))
        self._case: tuple[Any, cases.Case] | None = None

    def answer(self, frame: Frame) -> Frame:
        """Compile one config; how that went."""
        from portattn.tuner.offline import empty_inputs

        if self._case is None or self._case[0] != frame["case"]:
            self._case = frame["case"], cases.from_json(frame["case"])
        kernel, config = _what(frame)
        started = time.perf_counter_ns()
        try:
            code = self._offline.compile(kernel, empty_inputs(self._case[1]), config)
        except Exception as error:  # whatever the compiler raises is about this config
            text = f"{type(error).__name__}: {str(error)[:_MAX_TEXT]}"
            return {"status": "compile_error", "reason": text}
        return {"status": "ok", "code": code, "compile_ns": time.perf_counter_ns() - started}


class MeasureWorker:
    """Verifies and times on the device that the first frame names."""

    def __init__(self, frame: Frame) -> None:
        import torch

        from portattn.tuner.executor import LocalExecutor
        from portattn.tuner.timers import timer_for

        self._device = frame["device"]
        if frame["threads"]:
            torch.set_num_threads(frame["threads"])
        self._executor = LocalExecutor(timer_for(frame["device"], frame["policy"]))

    def answer(self, frame: Frame) -> Frame:
        """One call of `Executor`."""
        import dataclasses

        from portattn.tuner.executor import DeviceLostError, Entry

        if frame["do"] == "begin":
            limits.lift(self._device)
            self._executor.begin(cases.from_json(frame["case"]))
            limits.bound(self._device)
            return {"policy": self._executor.policy}
        try:
            if frame["do"] == "attempt":
                found = self._executor.attempt(*_what(frame), frame["best_ns"])
                return {
                    "verdict": dataclasses.asdict(found.verdict),
                    "samples": list(found.samples),
                }
            entries = [Entry(*_what(one), one["time_ns"]) for one in frame["entries"]]
            samples = self._executor.rounds(
                entries, frame["seconds"], min_rounds=frame["min_rounds"]
            )
        except DeviceLostError as error:
            return {"lost": str(error)[:_MAX_TEXT]}
        return {"samples": samples}


def _what(frame: Frame) -> tuple[Kernel, Config]:
    kernel = registry.kernel(frame["kernel"])
    return kernel, kernel.config_from_dict(frame["config"])


_ROLES: dict[str, Callable[[Frame], CompileWorker | MeasureWorker]] = {
    "compile": CompileWorker,
    "measure": MeasureWorker,
}


def main(role: str) -> None:
    """Answer frames until there are none."""
    questions, answers = frames.own_pipes()
    frames.die_with_parent()
    first = frames.read(questions)
    if first is None:
        return
    worker = _ROLES[role](first)
    frames.write(answers, {"ready": True})
    while (frame := frames.read(questions)) is not None:
        frames.write(answers, worker.answer(frame))


if __name__ == "__main__":
    main(sys.argv[1])
    # Compilers' libraries report at a normal exit what they did not free.
    sys.stdout.flush()
    os._exit(0)
