"""The process of `benchmarks.search_oracle` that holds the device: one JSON frame, one answer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from portattn.backends import registry
from portattn.tuner import cases, frames, measure
from portattn.tuner.timers import timing_event
from portattn.tuner.verify import Verifier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.backends.base import Config, Kernel
    from portattn.tuner.frames import Frame

_FLUSH_BYTES = 512 << 20  # ten times an H100's L2 cache; longer than the host needs for a call


class Recorder:
    """Times many configs without waiting for each: the host prepares one while others run.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: str) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        self._verifiers: dict[str, Verifier] = {}

    def answer(self, frame: Frame) -> Frame:
        """The outcomes of `configs` of a kernel on a case, each a time in ns or [status, why]."""
        verifier = self._verifier(frame["name"], frame["case"])
        kernel = registry.kernel(frame["kernel"])
        configs = [kernel.config_from_dict(values) for values in frame["configs"]]
        with torch.no_grad():
            if frame["rounds"]:
                return {"outcomes": self._rounds(verifier, kernel, configs, frame["rounds"])}
            return {"outcomes": self._once(verifier, kernel, configs)}

    def _verifier(self, name: str, case: dict[str, Any]) -> Verifier:
        if name not in self._verifiers:
            self._verifiers[name] = Verifier(cases.from_json(case))
        return self._verifiers[name]

    def _once(
        self, verifier: Verifier, kernel: Kernel, configs: Sequence[Config]
    ) -> list[int | list[str]]:
        """Each config once for its result and once, with a cold L2 cache, for its time."""
        begun: list[tuple[torch.cuda.Event, torch.cuda.Event, torch.Tensor] | list[str]] = []
        for config in configs:
            try:
                verifier.inputs.output.fill_(torch.nan)
                kernel.run(verifier.inputs, config)
                error = verifier.error()
                begun.append((*self._timed(verifier, kernel, config), error))
            except Exception as error:  # it ends this config
                begun.append(["launch_error", f"{type(error).__name__}: {str(error)[:300]}"])
        torch.cuda.synchronize()
        outcomes: list[int | list[str]] = []
        for one in begun:
            if isinstance(one, list):
                outcomes.append(one)
                continue
            start, end, found = one
            error_value = float(found)
            if error_value <= verifier.tolerance:  # NaN is not
                outcomes.append(_ns(start, end))
            else:
                why = f"output differs by {error_value:.3g}"
                outcomes.append(["nan" if error_value != error_value else "wrong_result", why])
        return outcomes

    def _rounds(
        self, verifier: Verifier, kernel: Kernel, configs: Sequence[Config], rounds: int
    ) -> list[int | list[str]]:
        """The median of several rounds in which the configs take turns."""
        begun = [
            [self._timed(verifier, kernel, config) for config in configs] for _ in range(rounds)
        ]
        torch.cuda.synchronize()
        samples = [[_ns(*pair) for pair in one] for one in begun]
        return [measure.summarise(one).median_ns for one in zip(*samples, strict=True)]

    def _timed(
        self, verifier: Verifier, kernel: Kernel, config: Config
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = timing_event(), timing_event()
        self._flush.zero_()
        start.record()
        kernel.run(verifier.inputs, config)
        end.record()
        return start, end


def _ns(start: torch.cuda.Event, end: torch.cuda.Event) -> int:
    return max(int(start.elapsed_time(end) * 1e6), 1)


def main() -> None:
    """Answer frames until there are none."""
    questions, answers = frames.own_pipes()
    frames.die_with_parent()
    first = frames.read(questions)
    if first is None:
        return
    recorder = Recorder(first["device"])
    frames.write(answers, {"ready": True})
    while (frame := frames.read(questions)) is not None:
        frames.write(answers, recorder.answer(frame))
    os._exit(0)  # at once, whatever the libraries would do at a normal exit


if __name__ == "__main__":
    main()
