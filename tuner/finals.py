"""The last rounds: every kernel's finalists against each other, and what is stored of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from portattn.tuner import measure
from portattn.tuner.executor import Entry
from portattn.tuner.report import KernelReport
from portattn.tuner.verify import RULE, SEEDS
from portattn.tuning_db.identity import canonical_json
from portattn.tuning_db.records import KernelResult, Measurement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.backends.base import Config
    from portattn.tuner.confirm import Confirmation
    from portattn.tuner.contender import Contender
    from portattn.tuner.executor import Executor

_CLOSE = 1.005  # times the fastest: as fast as it, as far as one can tell


def finals(
    contenders: Sequence[Contender], executor: Executor, deadline: float
) -> list[tuple[list[Measurement], int]]:
    """Time every kernel's finalists in the same rounds: kernels compare as well as configs do.

    Returns:
        For each contender its finalists' measurements, the default first, and which of them wins.
    """
    left = max(deadline - time.monotonic(), 0)
    left_ns = int(1e9 * left) // max(len(contenders), 1)
    finalists = [contender.finalists(left_ns) for contender in contenders]
    entries = [
        Entry(contender.kernel, config, contender.times_ns[config])
        for contender, configs in zip(contenders, finalists, strict=True)
        for config in configs
    ]
    # One alone has nobody to beat.
    min_rounds = 1 if len(entries) < 2 else measure.MIN_ROUNDS
    samples = executor.rounds(entries, left, min_rounds=min_rounds)
    results: list[tuple[list[Measurement], int]] = []
    begin = 0
    for contender, configs in zip(contenders, finalists, strict=True):
        mine = samples[begin : begin + len(configs)]
        begin += len(configs)
        timings = [measure.summarise(one) for one in mine]
        measured = [
            Measurement(
                params=config.to_dict(),
                round=1,
                status="ok",
                timing=timing,
                default_ns=timings[0].median_ns,
                max_abs_err=contender.verdicts[config].max_abs_err,
                max_rel_err=contender.verdicts[config].max_rel_err,
            )
            for config, timing in zip(configs, timings, strict=True)
        ]
        results.append((measured, winner(contender, configs, mine) if configs else 0))
    return results


def winner(
    contender: Contender, finalists: Sequence[Config], samples: Sequence[Sequence[int]]
) -> int:
    """Which finalist wins: the fastest by paired samples, if it clearly beats the default.

    Within half a percent of the fastest the incumbent stays, so that tuning again changes nothing
    without need; without one a winner of other problems is taken, and then the first by its
    fields, so that chance decides nothing.
    """
    medians = [measure.summarise(one).median_ns for one in samples]
    faster = [
        index
        for index in range(1, len(finalists))
        if measure.is_faster(samples[index], samples[0])
    ]
    if not faster:
        return 0
    best = min(medians[index] for index in faster)

    def order(index: int) -> tuple[bool, bool, str]:
        config = finalists[index]
        fields = canonical_json(config.to_dict())
        return config != contender.incumbent, config not in contender.known, fields

    return min((index for index in faster if medians[index] <= _CLOSE * best), key=order)


def verdict(
    contender: Contender,
    measured: list[Measurement],
    winner: int,
    confirmation: Confirmation | None = None,
) -> tuple[KernelResult, KernelReport]:
    """What is stored of a contender, and what is shown.

    Args:
        contender: whose.
        measured, winner: of `finals`.
        confirmation: of the winner in another process; without success there the default stays.
    """
    unconfirmed = ""
    if confirmation is not None and not confirmation.is_faster:
        fields = canonical_json(measured[winner].params)
        unconfirmed = f"{fields} in a fresh process: {confirmation.text}"
        winner, confirmation = 0, None
    best = measured[winner] if measured else None
    result = KernelResult(
        kernel_name=contender.kernel.name,
        backend=contender.kernel.backend,
        toolchain_class=contender.toolchain_class,
        source_sha256=contender.source_sha256,
        space_sha256=contender.space_sha256,
        measurements=tuple(measured),
        best=best,
        verified_seeds=len(SEEDS),
        verified_rule=RULE,
        expected_rev=contender.incumbent_rev,
        confirmed_ns=confirmation.best_ns if confirmation is not None else None,
        confirmed_default_ns=confirmation.default_ns if confirmation is not None else None,
    )
    rejected = tuple(
        (one.params, one.status, one.error) for one in contender.measurements if one.status != "ok"
    )
    report = KernelReport(
        name=contender.kernel.name,
        feasible=len(contender.space.configs),
        declared=contender.space.declared,
        tried=len(contender.measurements),
        infeasible=contender.space.infeasible,
        rejected=rejected,
        params=best.params if best is not None else None,
        default_ns=(best.default_ns or 0) if best is not None else 0,
        best_ns=best.timing.median_ns if best is not None and best.timing is not None else 0,
        kept_default=winner == 0,
        unconfirmed=unconfirmed,
    )
    return result, report
