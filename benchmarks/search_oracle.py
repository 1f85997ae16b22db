"""Records the time of every config of the GPU forward kernels: what `portattn bench-search` plays.

    python -m benchmarks.search_oracle --seconds 120 --out benchmarks/results/h100_oracle.json

Compilers run in parallel, one process measures, and tables are written as they are completed, the
most telling first; when the time is up, what is not complete is left out. Each config runs once
for its result, which is compared with float64, and is timed with a cold L2 cache: all of them
once, those near the best again in turns. Two fields are held: `min_piece` where no row is long
enough to be cut, and of the plain Triton kernel, whose space is large, `tma` and
`partial_stages`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portattn.backends import registry
from portattn.device import DeviceKey, device_key
from portattn.tuner import cases, frames, oracle
from portattn.tuner.pool import CompilePool
from portattn.tuner.space import enumerate_space
from portattn.tuning_db.identity import toolchain_class

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from portattn.backends.base import Config, Kernel
    from portattn.tuner.cases import Case
    from portattn.tuner.pool import Compilation

_TOKENS, _WIDTH = 16384, 2048
_MASKS = {  # by sequence length; min_piece matters where a few rows keep all keys
    1024: ("causal", ""),
    4096: ("causal", "", "sliding_window:1024", "longformer:512:64"),
    16384: ("causal", "", "sliding_window:1024", "longformer:512:64"),
}
_CUT_ROWS = "longformer"
# Fields that decide how blocks are given out, and not what is compiled.
_RUN_TIME = frozenset({"head_group", "min_piece", "persistent"})
_HELD = {"triton_forward": ("tma", "partial_stages")}
_GROUPS = (  # kernel, head_dim, at most so many problems
    ("triton_forward_hopper", 128, 10),
    ("cupy_forward_sm90", 128, 10),
    ("triton_forward_hopper", 64, 10),
    ("triton_forward_hopper", 256, 10),
    ("cupy_forward_sm90", 256, 10),
    ("cupy_forward_sm80", 128, 10),
    ("cupy_forward_sm90", 64, 5),
    ("triton_forward", 128, 10),
    ("cupy_forward_sm80", 64, 10),
    ("cupy_forward_sm80", 256, 10),
)
_BATCH = 24  # configs in one question
_BATCH_SECONDS = 8.0  # more hangs
_START_SECONDS = 120.0
_AGAIN, _ROUNDS, _FINAL, _FINAL_ROUNDS = 40, 4, 8, 9


@dataclasses.dataclass(eq=False)
class Work:
    """One table under way.

    Attributes:
        name, case, kernel: what.
        configs: the recorded space, the default first.
        compilations: of each config's code.
        outcomes: config -> ns, or [status, reason].
    """

    name: str
    case: Case
    kernel: Kernel
    configs: list[Config]
    compilations: dict[Config, Compilation]
    outcomes: dict[Config, int | list[str]] = dataclasses.field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether every config has an outcome."""
        return len(self.outcomes) == len(self.configs)

    def ready(self) -> list[Config]:
        """Configs that can be measured; those that did not compile get their outcome here."""
        found = []
        for config in self.configs:
            if config in self.outcomes or not self.compilations[config].ready.is_set():
                continue
            done = self.compilations[config]
            if done.status == "ok":
                found.append(config)
            else:
                self.outcomes[config] = [done.status or "crash", done.reason]
        return found

    def fastest(self, count: int) -> list[Config]:
        """The configs with the smallest times."""
        timed = {config: out for config, out in self.outcomes.items() if isinstance(out, int)}
        return sorted(timed, key=timed.__getitem__)[:count]

    def table(self) -> oracle.Table:
        """What was recorded."""
        fields = tuple(self.configs[0].to_dict())
        outcomes = {
            tuple(config.to_dict().values()): out if isinstance(out, int) else out[0]
            for config, out in self.outcomes.items()
        }
        default = tuple(self.configs[0].to_dict().values())
        return oracle.Table(
            self.kernel.name, self.kernel.backend, self.name, fields, default, outcomes
        )


def texts(head_dim: int) -> list[str]:
    """The problems of a head_dim: those that differ most come first."""
    found = [
        f"b{_TOKENS // seqlen} h{_WIDTH // head_dim} s{seqlen} d{head_dim} bfloat16 {mask}".strip()
        for seqlen, masks in sorted(_MASKS.items())
        for mask in masks
    ]
    return [found[index] for index in (3, 6, 0, 8, 9, 2, 7, 1, 4, 5)]


def space(kernel: Kernel, case: Case, name: str) -> list[Config]:
    """The configs to record, the default first."""
    configs = enumerate_space(kernel, case.problem).configs
    default = configs[0].to_dict()
    held = [*_HELD.get(kernel.name, ()), *(() if _CUT_ROWS in name else ("min_piece",))]
    return [
        config
        for config in configs
        if all(config.to_dict()[field] == default[field] for field in held if field in default)
    ]


def plan(pool: CompilePool, device: str, groups: Sequence[str]) -> Iterator[Work]:
    """Every table to record, one by one, its code on its way to the compilers."""
    for rank, (kernel_name, head_dim, most) in enumerate(_GROUPS):
        if groups and f"{kernel_name}:{head_dim}" not in groups:
            continue
        kernel = registry.kernel(kernel_name)
        codes: dict[tuple[Any, ...], Compilation] = {}
        for name in texts(head_dim)[:most]:
            case = cases.parse(name, device)
            compilations = {}
            configs = space(kernel, case, name)
            for config in configs:
                fields = config.to_dict().items()
                code = tuple(value for field, value in fields if field not in _RUN_TIME)
                if code not in codes:
                    codes[code] = pool.submit(case, kernel, config, rank)
                compilations[config] = codes[code]
            yield Work(name, case, kernel, configs, compilations)


class LostError(Exception):
    """The measuring process crashed or hung."""


class Device:
    """The measuring process; started when it is needed."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._peer: frames.Peer | None = None
        self._begun: set[str] = set()

    def outcomes(self, work: Work, configs: Sequence[Config], rounds: int) -> list[Any]:
        """Ask for outcomes.

        Raises:
            LostError: a config took the process along.
        """
        question = {
            "name": work.name,
            "case": work.case.to_json(),
            "kernel": work.kernel.name,
            "configs": [config.to_dict() for config in configs],
            "rounds": rounds,
        }
        try:
            if self._peer is None:
                command = [sys.executable, "-m", "benchmarks.search_oracle_worker"]
                self._peer, self._begun = frames.Peer(command), set()
                self._peer.ask({"device": self._device}, _START_SECONDS)
            if work.name not in self._begun:
                self._peer.ask({**question, "configs": [], "rounds": 0}, _START_SECONDS)
                self._begun.add(work.name)
            return list(self._peer.ask(question, _BATCH_SECONDS)["outcomes"])
        except frames.PeerLostError as error:
            self._peer = None
            raise LostError(str(error)) from error

    def close(self) -> None:
        """End the process."""
        if self._peer is not None:
            self._peer.end()


def record(
    planned: Iterator[Work], pool: CompilePool, device: Device, end: float
) -> Iterator[Work]:
    """Measure until the end; yields tables as they are completed.

    A table with a config that ends the measuring process is given up: each such config costs the
    time of a new process.
    """
    open_works: list[Work] = []
    is_planned = False
    while time.monotonic() < end and (open_works or not is_planned):
        ready = next(((work, found) for work in open_works if (found := work.ready())), None)
        if not is_planned and (ready is None or pool.is_idle):
            work = next(planned, None)
            is_planned = work is None
            open_works += [] if work is None else [work]
        elif ready is None:
            with pool.finished:
                pool.finished.wait(0.02)
        else:
            work, found = ready
            batch = found[:_BATCH]
            try:
                work.outcomes |= zip(batch, device.outcomes(work, batch, 0), strict=True)
                if work.is_done:
                    refine(work, device)
            except LostError as error:
                open_works.remove(work)
                text = "; ".join(str(config.to_dict()) for config in batch)
                print(f"given up: {work.kernel.name} {work.name}: {error}: one of {text}")
                continue
            if work.is_done:
                open_works.remove(work)
                yield work


def refine(work: Work, device: Device) -> None:
    """Time the best again, in turns; the others' times follow what that says of the first ones.

    Those that come out fastest of many were lucky, and the device may have become warmer.
    """
    for count, rounds in ((_AGAIN, _ROUNDS), (_FINAL, _FINAL_ROUNDS)):
        again = list(dict.fromkeys([*work.fastest(count), work.configs[0]]))
        before = [work.outcomes[config] for config in again]
        times = device.outcomes(work, again, rounds)
        pairs = list(zip(before, times, strict=True))
        ratios = [new / old for old, new in pairs if isinstance(new, int) and isinstance(old, int)]
        if not ratios:
            continue
        work.outcomes |= zip(again, times, strict=True)
        scale, fastest = statistics.median(ratios), min(t for t in times if isinstance(t, int))
        for config in set(work.outcomes).difference(again):
            old = work.outcomes[config]
            if isinstance(old, int):
                work.outcomes[config] = max(int(scale * old), fastest)


def main() -> None:
    """Record, and write what is complete after each table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--group", action="append", default=[], help="KERNEL:HEAD_DIM")
    options = parser.parse_args()
    started = time.monotonic()
    key: DeviceKey = device_key(options.device)
    done: list[oracle.Table] = []
    device = Device(options.device)
    with CompilePool(key) as pool:
        works = plan(pool, options.device, options.group)
        for work in record(works, pool, device, started + options.seconds):
            done.append(work.table())
            options.out.write_text(oracle.dump(key.name, done), encoding="utf-8")
            best = work.fastest(1)[0]
            failed = sum(not isinstance(out, int) for out in work.outcomes.values())
            print(
                f"{time.monotonic() - started:6.1f} s  {work.kernel.name} "
                f"({toolchain_class(work.kernel.backend)})  {work.name}: {len(work.configs)} "
                f"configs, {failed} failed, default {work.outcomes[work.configs[0]]} ns, best "
                f"{work.outcomes[best]} ns: {best.to_dict()}",
                flush=True,
            )
    device.close()


if __name__ == "__main__":
    main()
