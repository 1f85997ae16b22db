"""A row: who takes part, what is checked, what is recorded."""

import dataclasses
import itertools
import json
import pickle
import time

import pytest
import torch

from portattn.bench import contender, peers, peers_flex, rounds, session, workloads
from portattn.bench.contender import NotApplicableError
from portattn.bench.data import Data, Reference
from portattn.bench.limits import Limits
from portattn.bench.patterns import Pattern
from portattn.bench.results import Results
from portattn.errors import ConfigError

CPU = torch.device("cpu")
LIMITS = Limits(0.1, 0.01)
WINDOW = workloads.parse("h2 s256 d32 float32 sliding_window:32")
RUN = {"device": "here", "date": "2026-01-01"}


def settings(kernels=("cpu_forward", "cpu_decode"), others=("sdpa", "sdpa_mask")):
    return session.Settings(CPU, kernels, others, 0.001)


def test_a_row():
    row = session.run_row(WINDOW, settings(), LIMITS)
    assert row["name"] == "problem: b1 h2 s256 d32 float32 sliding_window:32"
    assert row["pairs"] == 2 * (256 * 32 - 31 * 32 // 2)
    assert row["operations"] == 4 * 32 * row["pairs"]
    assert row["cold_l2"] is False
    assert set(row["contenders"]) == {"cpu_forward", "sdpa_mask"}
    assert row["not_run"]["cpu_decode"].startswith("refused: ")
    assert row["not_run"]["sdpa"] == "SDPA has this mask only as a tensor"
    assert (row["best_own"], row["best_peer"]) == ("cpu_forward", "sdpa_mask")
    own, peer = row["contenders"]["cpu_forward"], row["contenders"]["sdpa_mask"]
    assert own["rounds"] >= rounds.MIN_ROUNDS
    assert own["p20_ms"] <= own["median_ms"] <= own["p80_ms"]
    assert own["tflops"] == pytest.approx(row["operations"] / own["median_ms"] / 1e9)
    assert own["of_matmul"] == pytest.approx(own["tflops"] / LIMITS.matmul_tflops)
    assert own["of_roofline"] == pytest.approx(row["roofline"]["least_ms"] / own["median_ms"])
    assert own["of_best_peer"] == pytest.approx(peer["median_ms"] / own["median_ms"])
    assert own["config_from"] in ("default", "exact", "stale", "family", "seeds", "nearest")
    json.dumps(row)


def test_flex_attention_takes_part():
    documents = workloads.parse("h2 s256 d32 float32 causal_documents:3")
    row = session.run_row(documents, settings(("cpu_forward",), ("flex",)), LIMITS)
    assert set(row["contenders"]) == {"cpu_forward", "flex"}
    for one in row["contenders"].values():
        assert one["new_mask_ms"] > 0
        assert "planning_ms" in one
    theirs, ours = (row["contenders"][name]["new_mask_ms"] for name in ("flex", "cpu_forward"))
    assert row["contenders"]["cpu_forward"]["new_mask_of_best_peer"] == theirs / ours


def test_cache_keys_do_not_depend_on_who_imported_torch():
    peers_flex.share_compiled()
    for value in (torch.contiguous_format, torch.channels_last):
        pickled = pickle.dumps(value)
        assert pickle.loads(pickled) is value
        assert b"torch" not in pickled  # as in "torch.contiguous_format" of some module


def test_decode_counts_the_keys_that_exist():
    decode = workloads.parse("b3 h4 kv2 sq1 sk64 d32 float32 lengths:random")
    row = session.run_row(decode, settings(), LIMITS)
    assert set(row["contenders"]) == {"cpu_forward", "cpu_decode", "sdpa"}
    one = row["contenders"]["cpu_decode"]
    assert one["tbps"] == pytest.approx(decode.kv_bytes() / one["median_ms"] / 1e9)
    assert one["of_read"] == pytest.approx(one["tbps"] / LIMITS.read_tbps)


def test_blocks_run_beside_own_dense():
    blocks = workloads.Workload(
        "problem", 1, 2, 2, 256, 256, 32, Pattern("random_blocks", (64, 2)), dtype="float32",
        beside_dense=True,
    )  # fmt: skip
    row = session.run_row(blocks, settings(("cpu_forward",), ()), LIMITS)
    own, dense = (row["contenders"][n] for n in ("cpu_forward", "cpu_forward without the mask"))
    assert dense["tflops"] == pytest.approx(4 * 32 * 2 * 256**2 / dense["median_ms"] / 1e9)
    assert own["of_own_dense"] == pytest.approx(own["tflops"] / dense["tflops"])
    assert row["best_own"] == "cpu_forward"
    assert "best_peer" not in row


def test_passes_and_what_they_move():
    strided = workloads.parse("h2 s1024 d32 float32 sparse_transformer_strided:16")
    row = session.run_row(strided, settings(("cpu_forward",), ()), LIMITS)
    side = 2 * 1024 * 32 * 4  # bytes of each of query, key, value and output
    assert row["passes"] == 2
    assert row["pass_bytes"] == 2 * 3 * side + 2 * 4 * 2 * 1024 * 33 + side
    assert "of_read_in_passes" in row["contenders"]["cpu_forward"]


def test_a_wrong_result_is_not_timed(monkeypatch):
    def wrong(name, data, **arguments):
        return contender.Contender(name, True, lambda: torch.full_like(data.query, torch.nan))

    monkeypatch.setattr(contender, "own", wrong)
    row = session.run_row(WINDOW, settings(("cpu_forward",), ("sdpa_mask",)), LIMITS)
    assert set(row["contenders"]) == {"sdpa_mask"}
    assert row["not_run"]["cpu_forward"].startswith("wrong result: error nan")


def test_a_failing_peer_is_recorded(monkeypatch):
    def fail(data, name):
        raise RuntimeError("no\nsuch kernel")

    monkeypatch.setitem(peers._CPU, "sdpa", fail)
    row = session.run_row(WINDOW, settings(("cpu_forward",), ("sdpa",)), LIMITS)
    assert row["not_run"] == {"sdpa": "RuntimeError: no such kernel"}


def test_a_mask_that_cannot_be_made_again_is_recorded(monkeypatch):
    """The kernel's time stays."""
    made = contender.own

    def stale(name, data, **arguments):
        one = made(name, data, **arguments)
        return dataclasses.replace(one, fresh=lambda seed: one.fresh(1))

    monkeypatch.setattr(contender, "own", stale)
    documents = workloads.parse("h2 s256 d32 float32 documents:3")
    row = session.run_row(documents, settings(("cpu_forward",), ()), LIMITS)
    one = row["contenders"]["cpu_forward"]
    assert one["new_mask_error"].startswith("wrong result")
    assert one["median_ms"] > 0
    assert "new_mask_ms" not in one


def test_a_broken_row_is_recorded():
    huge = workloads.parse("b4096 h4096 s65536 d256 float32")
    row = session.run_row(huge, settings(), LIMITS)
    assert "error" in row
    assert row["name"] == huge.name


def test_the_reference_is_strict():
    data = Data(WINDOW, CPU)
    reference = Reference(data)
    right = contender.own("cpu_forward", data).output()
    assert reference.wrong(right) is None
    assert reference.wrong(right + 1e-3).startswith("wrong result")
    unmasked = contender.own("cpu_forward", data, is_dense=True).output()
    assert reference.wrong(unmasked).startswith("wrong result")


def test_peers_by_name():
    assert peers.peer_names("cpu") == ["sdpa", "sdpa_mask", "flex"]
    assert peers.peer_names("cuda") == [
        "sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flash_attn_4", "flex",
        "flex_flash_attn_4",
    ]  # fmt: skip
    assert peers.peer_names("cuda", ["flex", "sdpa_cudnn"]) == ["sdpa_cudnn", "flex"]
    with pytest.raises(ConfigError, match="must be one of sdpa, sdpa_mask, flex"):
        peers.peer_names("cpu", ["flash_attn_4"])


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotApplicableError, match="pip install --pre flash-attn-4"):
        peers._flash_attn_4(Data(WINDOW, CPU), "flash_attn_4")


def test_flash_attn_4_is_called_as_documented(monkeypatch):
    """Its arguments, and its layouts both ways, against a stand-in that computes with SDPA."""
    calls = []

    def attend(q, k, v, **arguments):
        calls.append(arguments)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        keep = None
        if "window_size" in arguments:
            distance = torch.arange(256)[:, None] - torch.arange(256)
            left, right = arguments["window_size"]
            keep = (distance <= left) & (distance >= -right)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=keep, is_causal=arguments.get("causal", False)
        )
        return out.transpose(1, 2), None

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        ends = cu_seqlens_q.tolist()
        spans = list(itertools.pairwise(ends))
        assert max_seqlen_q == max(end - begin for begin, end in spans)
        parts = [
            attend(q[None, a:b], k[None, a:b], v[None, a:b], causal=causal)[0] for a, b in spans
        ]
        return torch.cat(parts, 1)[0]

    module = type("cute", (), {"flash_attn_func": attend, "flash_attn_varlen_func": varlen})
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: module)
    for text in ("causal", "full", "sliding_window:32", "causal_documents:3"):
        data = Data(workloads.parse(f"h2 s256 d32 float32 {text}"), CPU)
        made = peers._flash_attn_4(data, "fa")
        assert Reference(data).wrong(made.output()) is None
    assert calls[2] == {"window_size": (31, 0)}
    assert made.fresh(1).shape == (1, 256, 2, 32)
    with pytest.raises(NotApplicableError, match="no such mask"):
        peers._flash_attn_4(Data(workloads.parse("h2 s256 d32 longformer:8:2"), CPU), "fa")


def test_rows_are_written_one_by_one_and_the_budget_holds(tmp_path):
    path = tmp_path / "rows" / "results.json"
    store = Results(path, dict(RUN), keep=False)
    rows = [workloads.parse(f"h1 s{length} d32 float32") for length in (64, 128)]
    seen = []

    def on_row(row):
        seen.append(json.loads(path.read_text()))

    one = settings(("cpu_forward",), ())
    left = session.run(rows, one, LIMITS, store, time.monotonic() + 60, on_row)
    assert left == []
    assert [len(document["rows"]) for document in seen] == [1, 2]
    assert session.run(rows, one, LIMITS, store, time.monotonic() - 1) == rows
    again = Results(path, dict(RUN), keep=True)
    assert again.names == {row.name for row in rows}
    again.add(session.run_row(rows[0], one, LIMITS))
    assert [row["run"] for row in again.document["rows"]] == [1, 0]
    with pytest.raises(ConfigError, match="rows are of here and not of elsewhere"):
        Results(path, {"device": "elsewhere"}, keep=True)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="holds no results"):
        Results(path, dict(RUN), keep=True)


def test_rounds_follow_from_the_time():
    calls = {"fast": lambda: None, "slow": lambda: time.sleep(0.002)}
    times = rounds.take_turns(rounds.CpuTimer(), calls, 0.0)
    assert times["slow"].rounds == times["fast"].rounds == rounds.MIN_ROUNDS
    assert times["slow"].p80 >= times["slow"].median >= times["slow"].p20 >= 2.0
    assert rounds.spread([3.0, 1.0, 2.0, 5.0, 4.0]) == rounds.Spread(3.0, 1.0, 5.0, 5)


def test_host_time_is_per_call():
    times = rounds.host_us({"a": lambda: sum(range(1000))}, lambda: None, 0.0)
    assert 1 < times["a"].median < 1000
