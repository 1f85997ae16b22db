"""One run of `portattn bench`: rows in order, each checked, timed in turns and written."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from typing import TYPE_CHECKING, Any

import torch

from portattn.bench import contender, peers, rounds
from portattn.bench.contender import Contender, NotApplicableError
from portattn.bench.data import Data, Reference
from portattn.bench.patterns import document_ends
from portattn.bench.roofline import operations, roofline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from portattn.bench.limits import Limits
    from portattn.bench.results import Results
    from portattn.bench.workloads import Workload

FRESH_ROUNDS = 12
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
        dangerous: (row, contender) -> why it must not run here, from the warm-up.
    """

    device: torch.device
    kernels: tuple[str, ...]
    peers: tuple[str, ...]
    seconds: float = 0.3
    dangerous: Mapping[tuple[str, str], str] = dataclasses.field(default_factory=dict)


def run(
    workloads: list[Workload],
    settings: Settings,
    limits: Limits,
    results: Results,
    end: float,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[Workload]:
    """Rows in order, each written when it is done.

    Args:
        workloads: the rows.
        settings: who takes part.
        limits: of the device.
        results: where rows go.
        end: no row begins after this `time.monotonic`.
        on_row: told each row.

    Returns:
        The rows for which there was no time.
    """
    for index, workload in enumerate(workloads):
        if time.monotonic() >= end:
            return workloads[index:]
        row = run_row(workload, settings, limits)
        results.add(row)
        on_row(row)
        if rounds.is_lost(settings.device):
            return workloads[index + 1 :]
    return []


def run_row(workload: Workload, settings: Settings, limits: Limits) -> dict[str, Any]:
    """Check and time one row; failures of contenders are text in ``not_run``."""
    started = time.perf_counter()
    row: dict[str, Any] = {"name": workload.name, "workload": workload.to_dict()}
    try:
        with torch.no_grad():
            row |= _measure(workload, settings, limits)
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


def _measure(workload: Workload, settings: Settings, limits: Limits) -> dict[str, Any]:
    data = Data(workload, settings.device)
    reference = Reference(data)
    ready, not_run = [], {}
    for name, make in _makers(data, settings):
        if (workload.name, name) in settings.dangerous:
            not_run[name] = settings.dangerous[workload.name, name]
            continue
        try:
            one = make()
            problem = _run_and_check(one, data, reference)
        except NotApplicableError as reason:
            problem = str(reason)
        except rounds.HungError as error:
            raise rounds.HungError(f"{name} {error}") from error
        except Exception as error:
            problem = error_text(error)
        if problem is None:
            ready.append(one)
        else:
            not_run[name] = problem
    pairs = workload.kept_pairs()
    bounds = roofline(workload, pairs, limits)
    row: dict[str, Any] = {
        "pairs": pairs,
        "operations": operations(pairs, workload.head_dim),
        "bytes": workload.total_bytes(),
        **_pass_bytes(data),
        "roofline": dataclasses.asdict(bounds)
        | {"least_ms": bounds.least_ms, "bound": bounds.bound},
        "cold_l2": settings.device.type == "cuda" and workload.metric != "host",
        "contenders": {},
        "not_run": not_run,
    }
    if ready:
        row["contenders"] = _times(ready, data, settings)
        _rates(row, workload, limits)
        row |= _ratios(row["contenders"])
    return row


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


def _times(ready: list[Contender], data: Data, settings: Settings) -> dict[str, dict[str, Any]]:
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
    _fresh(ready, data, found)
    return found


def _fresh(ready: list[Contender], data: Data, found: dict[str, dict[str, Any]]) -> None:
    """Documents: from a new batch's boundaries to the result, and what of it is the mask's.

    ``planning_ms`` is the host's time of such a call beyond that of one whose mask is known.
    """
    calls = {one.name: one.fresh for one in ready if one.fresh is not None}
    if not calls:
        return
    for seed in range(FRESH_ROUNDS + 1):  # remembered: drawing them is nobody's cost
        document_ends(data.workload.seqlen_k, data.workload.pattern.values[0], seed)
    for call in calls.values():
        call(0)
    cached = {one.name: (lambda seed, call=one.call: call()) for one in ready if one.name in calls}
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


def _waiter(data: Data) -> Callable[[], None]:
    return torch.cuda.synchronize if data.device.type == "cuda" else (lambda: None)


def _pass_bytes(data: Data) -> dict[str, int]:
    """What a mask in several passes must move: each reads its rows, the next takes over its sums.

    Between passes the rows' float32 output and LSE are written and read.
    """
    workload = data.workload
    if data.mask is None or workload.metric == "host":
        return {}
    passes = len(data.mask.plan(workload.seqlen_q, workload.seqlen_k).pass_steps)
    if passes == 1:
        return {}
    rows = workload.batch * workload.num_heads * workload.seqlen_q
    query_bytes = rows * workload.head_dim * workload.torch_dtype.itemsize
    carried = 2 * 4 * rows * (workload.head_dim + 1)
    inputs = passes * (query_bytes + workload.kv_bytes())
    return {"passes": passes, "pass_bytes": inputs + (passes - 1) * carried + query_bytes}


def _rates(row: dict[str, Any], workload: Workload, limits: Limits) -> None:
    """Rates and shares of what the device can do."""
    # Of decoding, the keys and values that exist count; query and output are small beside them.
    moved = workload.kv_bytes() if workload.metric == "bandwidth" else row["bytes"]
    dense = workload.batch * workload.num_heads * workload.seqlen_q * workload.seqlen_k
    for one in row["contenders"].values():
        if "median_ms" not in one:
            continue
        seconds = one["median_ms"] / 1e3
        pairs = dense if one["is_dense"] else row["pairs"]
        one["tflops"] = operations(pairs, workload.head_dim) / seconds / 1e12
        one["of_matmul"] = one["tflops"] / limits.matmul_tflops
        if one["is_dense"]:
            continue
        one["of_roofline"] = row["roofline"]["least_ms"] / one["median_ms"]
        one["tbps"] = moved / seconds / 1e12
        one["of_read"] = one["tbps"] / limits.read_tbps
        if "pass_bytes" in row:
            one["of_read_in_passes"] = row["pass_bytes"] / seconds / 1e12 / limits.read_tbps


def _ratios(contenders: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each contender against the best peer (1.05: 5 % faster), and the best kernel."""
    key = "host_us" if any("host_us" in one for one in contenders.values()) else "median_ms"
    theirs = {n: one[key] for n, one in contenders.items() if not one["is_own"]}
    ours = {n: one[key] for n, one in contenders.items() if one["is_own"] and not one["is_dense"]}
    summary: dict[str, Any] = {}
    if theirs:
        best = min(theirs, key=lambda name: theirs[name])
        summary["best_peer"] = best
        for one in contenders.values():
            one["of_best_peer"] = theirs[best] / one[key]
    if ours:
        summary["best_own"] = min(ours, key=lambda name: ours[name])
    for name in ours:
        dense = contenders.get(name + contender.DENSE_SUFFIX)
        if dense is not None:
            contenders[name]["of_own_dense"] = contenders[name]["tflops"] / dense["tflops"]
    return summary
