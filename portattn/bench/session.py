"""One run of `portattn bench`: rows in order, each checked, timed in turns and written."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import time
from typing import TYPE_CHECKING, Any

import torch

from portattn.bench import contender, peers, rates, rounds
from portattn.bench.contender import Contender, NotApplicableError
from portattn.bench.data import Data, Reference
from portattn.bench.patterns import document_ends
from portattn.bench.roofline import operations, roofline
from portattn.bench.time_limit import TimeLimitError, time_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from portattn.bench.limits import Limits
    from portattn.bench.results import Results
    from portattn.bench.workloads import Workload

FRESH_ROUNDS = 24
RUN_SECONDS = 20.0  # a contender that runs longer has hung
_ERROR_CHARS = 400


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Who takes part, and for how long.

    Attributes:
        device: where.
        kernels: names of portattn's kernels.
        peers: names of peers.
        seconds: to time each contender of a row, on average.
        limit_seconds: for a contender to be made, run once and checked.
        dangerous: (row, contender) -> why it must not run here, from the warm-up.
    """

    device: torch.device
    kernels: tuple[str, ...]
    peers: tuple[str, ...]
    seconds: float = 0.3
    limit_seconds: float = 60.0
    dangerous: Mapping[tuple[str, str], str] = dataclasses.field(default_factory=dict)


def run(
    workloads: list[Workload],
    settings: Settings,
    limits: Limits,
    results: Results,
    end: float,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Workload]:
    """Rows in order, each written when it is done.

    Args:
        workloads: the rows.
        settings: who takes part.
        limits: of the device.
        results: where rows go.
        end: no row begins after this `time.monotonic`, and no contender of a row.
        on_row: told each row.
        say: told what is about to be done.

    Returns:
        The rows for which there was no time.
    """
    for index, workload in enumerate(workloads):
        if time.monotonic() >= end:
            return workloads[index:]
        row = run_row(workload, settings, limits, end, say)
        results.add(row)
        on_row(row)
        if rounds.is_lost(settings.device):
            return workloads[index + 1 :]
    return []


def run_row(
    workload: Workload,
    settings: Settings,
    limits: Limits,
    end: float = math.inf,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Check and time one row; failures of contenders are text in ``not_run``."""
    started = time.perf_counter()
    row: dict[str, Any] = {"name": workload.name, "workload": workload.to_dict()}
    try:
        with torch.no_grad():
            row |= _measure(workload, settings, limits, end, say)
    except Exception as error:
        row |= {"error": error_text(error)}
    finally:
        contender.forget_compiled()
        gc.collect()
        if settings.device.type == "cuda" and not rounds.is_lost(settings.device):
            torch.cuda.empty_cache()
    return row | {"seconds": round(time.perf_counter() - started, 2)}


def error_text(error: BaseException) -> str:
    """An error's type and the beginning of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_ERROR_CHARS]}"


def _measure(
    workload: Workload,
    settings: Settings,
    limits: Limits,
    end: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    data = Data(workload, settings.device)
    reference = Reference(data)
    ready, not_run = [], {}
    for name, make in _makers(data, settings):
        if (workload.name, name) in settings.dangerous:
            not_run[name] = settings.dangerous[workload.name, name]
            continue
        say(f"{workload.name}: {name}")
        left = min(settings.limit_seconds, end - time.monotonic())
        one = _ready(name, make, data, reference, left)
        if isinstance(one, str):
            not_run[name] = one
        else:
            ready.append(one)
    pairs = workload.kept_pairs()
    bounds = roofline(workload, pairs, limits)
    row: dict[str, Any] = {
        "pairs": pairs,
        "operations": operations(pairs, workload.head_dim),
        "bytes": workload.total_bytes(),
        **rates.pass_bytes(data),
        "roofline": dataclasses.asdict(bounds)
        | {"least_ms": bounds.least_ms, "bound": bounds.bound},
        "cold_l2": settings.device.type == "cuda" and workload.metric != "host",
        "contenders": {},
        "not_run": not_run,
    }
    if ready:
        row["contenders"] = _times(ready, data, reference, settings)
        rates.add_rates(row, workload, limits)
        rates.add_ratios(row)
    return row


def _ready(
    name: str, make: Callable[[], Contender], data: Data, reference: Reference, seconds: float
) -> Contender | str:
    """A contender that gave the right result within some seconds, or why there is none."""
    started = time.perf_counter()
    try:
        with time_limit(seconds):
            one = make()
            problem = _run_and_check(one, data, reference)
    except NotApplicableError as reason:
        problem = str(reason)
    except rounds.HungError as error:
        raise rounds.HungError(f"{name} {error}") from error
    except (Exception, TimeLimitError) as error:
        problem = error_text(error)
    if problem is not None:
        return problem
    one.details["ready_s"] = round(time.perf_counter() - started, 2)
    return one


def _makers(data: Data, settings: Settings) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Contenders in order, as functions that make them."""
    for name in settings.kernels:
        yield name, functools.partial(contender.own, name, data)
        if data.workload.beside_dense:
            yield (
                name + contender.DENSE_SUFFIX,
                functools.partial(contender.own, name, data, is_dense=True),
            )
    for name in settings.peers:
        yield name, functools.partial(peers.peer, name, data)


def _run_and_check(one: Contender, data: Data, reference: Reference) -> str | None:
    """Run once; what is wrong, or None. Dense companions have no reference here."""
    # The allocator most likely hands this block to the output: what is not written stays NaN.
    poison = torch.full_like(data.query, torch.nan)
    del poison
    output = one.output()
    if data.device.type == "cuda":
        rounds.wait(RUN_SECONDS)
    if one.is_dense:
        return None
    return reference.wrong(output)


def _times(
    ready: list[Contender], data: Data, reference: Reference, settings: Settings
) -> dict[str, dict[str, Any]]:
    """The numbers of each contender that gave the right result."""
    found: dict[str, dict[str, Any]] = {
        one.name: {"is_own": one.is_own, "is_dense": one.is_dense, **one.details} for one in ready
    }
    calls = {one.name: one.call for one in ready}
    if data.workload.metric == "host":
        for name, host in rounds.host_us(calls, _waiter(data), settings.seconds).items():
            found[name] |= {
                "host_us": host.median, "p20_us": host.p20, "p80_us": host.p80,
                "rounds": host.rounds,
            }  # fmt: skip
        return found
    times = rounds.take_turns(rounds.timer_for(data.device), calls, settings.seconds)
    for name, one in times.items():
        found[name] |= {
            "median_ms": one.median, "p20_ms": one.p20, "p80_ms": one.p80, "rounds": one.rounds,
        }  # fmt: skip
    _fresh(ready, data, reference, settings, found)
    return found


def _fresh(
    ready: list[Contender],
    data: Data,
    reference: Reference,
    settings: Settings,
    found: dict[str, dict[str, Any]],
) -> None:
    """Documents: from a new batch's boundaries to the result, and what of it is the mask's.

    ``planning_ms`` is the host's time of such a call beyond that of one whose mask is known.
    """
    if not data.workload.pattern.is_documents:
        return
    for seed in range(FRESH_ROUNDS + 2):  # remembered: drawing them is nobody's cost
        document_ends(data.workload.seqlen_k, data.workload.pattern.values[0], seed)
    calls, cached = {}, {}
    for one in ready:
        if one.fresh is None:
            continue
        problem = _fresh_problem(one, one.fresh, reference, settings.limit_seconds)
        if problem is None:
            calls[one.name] = one.fresh
            cached[one.name] = lambda seed, call=one.call: call()
        else:
            found[one.name]["new_mask_error"] = problem
    if not calls:
        return
    waiter = _waiter(data)
    known = rounds.fresh_times(cached, waiter, FRESH_ROUNDS)
    new = rounds.fresh_times(calls, waiter, FRESH_ROUNDS)
    for name, (waited, returned) in new.items():
        found[name] |= {
            "new_mask_ms": waited.median,
            "new_mask_p20_ms": waited.p20,
            "new_mask_p80_ms": waited.p80,
            "planning_ms": returned.median - known[name][1].median,
        }


def _fresh_problem(
    one: Contender, call: Callable[[int], torch.Tensor], reference: Reference, seconds: float
) -> str | None:
    """Other boundaries, then the row's own: what is wrong with the result, or None."""
    try:
        with time_limit(seconds):
            call(FRESH_ROUNDS + 1)
            return reference.wrong(one.as_bhsd(call(0)))
    except (Exception, TimeLimitError) as error:
        return error_text(error)


def _waiter(data: Data) -> Callable[[], None]:
    return torch.cuda.synchronize if data.device.type == "cuda" else (lambda: None)
