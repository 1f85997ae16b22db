"""What a row's times say: rates, shares of what the device can do, ratios to peers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from portattn.bench import contender
from portattn.bench.roofline import operations

if TYPE_CHECKING:
    from portattn.bench.data import Data
    from portattn.bench.limits import Limits
    from portattn.bench.workloads import Workload


def pass_bytes(data: Data) -> dict[str, int]:
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


def add_rates(row: dict[str, Any], workload: Workload, limits: Limits) -> None:
    """Rates and shares of what the device can do, into each of the row's contenders."""
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


def add_ratios(row: dict[str, Any]) -> None:
    """Each contender against the best peer (1.05: 5 % faster), and the best kernel.

    Of documents also from new boundaries to the result: ``new_mask_of_best_peer``.
    """
    found: dict[str, dict[str, Any]] = row["contenders"]
    key = "host_us" if any("host_us" in one for one in found.values()) else "median_ms"
    ours = [n for n, one in found.items() if one["is_own"] and not one["is_dense"]]
    best = _best_peer(found, key)
    if best is not None:
        row["best_peer"] = best
    for name, into in ((key, "of_best_peer"), ("new_mask_ms", "new_mask_of_best_peer")):
        fastest = _best_peer(found, name)
        for one in found.values():
            if fastest is not None and name in one:
                one[into] = found[fastest][name] / one[name]
    if ours:
        row["best_own"] = min(ours, key=lambda name: found[name][key])
    for name in ours:
        dense = found.get(name + contender.DENSE_SUFFIX)
        if dense is not None:
            found[name]["of_own_dense"] = found[name]["tflops"] / dense["tflops"]


def _best_peer(found: dict[str, dict[str, Any]], key: str) -> str | None:
    theirs = {name: one[key] for name, one in found.items() if not one["is_own"] and key in one}
    return min(theirs, key=lambda name: theirs[name]) if theirs else None
