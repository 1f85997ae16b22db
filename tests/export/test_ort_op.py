"""libportattn as an ONNX Runtime custom op: caches, threads, bad input."""

import concurrent.futures
import subprocess

import numpy as np
import onnxruntime
import pytest
import torch

from portattn import masks, native
from tests.export.node_models import check, library_options, make_call


def open_session(call):
    model = call.model()
    return onnxruntime.InferenceSession(model.SerializeToString(), library_options())


def test_one_session_many_lengths_and_data():
    """More plans than the kernel's cache holds, and other mask data of the same shape."""
    first = torch.tensor([0, 30, 50, 200])
    session = open_session(make_call(masks.documents(first) & masks.causal(), 20, 20))
    for boundaries in (first, torch.tensor([0, 9, 33, 200])):
        mask = masks.documents(boundaries) & masks.causal()
        for seqlen in range(4, 40, 2):
            call = make_call(mask, seqlen, seqlen, batch=1, head_dim=8, head_dim_v=8)
            check(session.run(None, call.feeds), call)


def test_one_session_from_many_threads():
    session = open_session(make_call(masks.longformer(16, 3), 20, 20))
    calls = [make_call(masks.longformer(16, 3), 20 + n, 20 + n) for n in range(20)]
    alone = [session.run(None, call.feeds)[0] for call in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda call: session.run(None, call.feeds)[0], calls * 5))
    for result, expected in zip(results, alone * 5, strict=True):
        np.testing.assert_array_equal(result, expected)


def test_a_long_row_is_cut_for_all_threads():
    call = make_call(None, 4, 6000, batch=1, heads=2, kv_heads=1, return_lse=True)
    check(open_session(call).run(None, call.feeds), call)


BAD_FEEDS = {
    "Q": (np.zeros((2, 4, 8, 12), np.float32), "do not go together"),
    "K": (np.zeros((2, 3, 8, 16), np.float32), "do not go together"),
    "alibi_slopes": (
        np.zeros(3, np.float32),
        r"alibi_slopes has shape \[3\]; it must be \[heads\]",
    ),
    "bias": (np.zeros((2, 4, 8, 7), np.float32), r"bias has shape \[2, 4, 8, 7\]"),
    "sinks": (np.zeros(5, np.float32), r"sinks has shape \[5\]"),
    "data_0": (np.array([0, 4, 7]), r"cover the positions \[0, 7\)"),
}


@pytest.mark.parametrize("name", BAD_FEEDS)
def test_bad_shapes_are_errors_that_name_them(name):
    mask = masks.documents(torch.tensor([0, 4, 8]))
    call = make_call(mask, 8, 8, terms=("alibi", "bias", "sinks"))
    value, message = BAD_FEEDS[name]
    with pytest.raises(Exception, match=message):
        open_session(call).run(None, call.feeds | {name: value})


def test_bad_attributes_stop_the_session():
    model = make_call(None, 8, 8, mode="start").model()
    mode = next(a for a in model.graph.node[0].attribute if a.name == "q_offset_mode")
    mode.s = b"middle"
    with pytest.raises(Exception, match='q_offset_mode is "middle"'):
        onnxruntime.InferenceSession(model.SerializeToString(), library_options())


def test_bad_program_is_an_error():
    call = make_call(masks.causal(), 8, 8)
    model = call.model(body=False)
    program = next(a for a in model.graph.node[0].attribute if a.name == "program")
    program.ints[:] = [1, 13, 1000]
    session = onnxruntime.InferenceSession(model.SerializeToString(), library_options())
    with pytest.raises(Exception, match=r"com\.portattn::Attention"):
        session.run(None, call.feeds)


def test_library_needs_no_onnxruntime_to_link():
    listed = subprocess.run(
        ["readelf", "-d", native.library_path()], capture_output=True, text=True, check=True
    ).stdout
    needed = [line for line in listed.splitlines() if "NEEDED" in line]
    assert needed
    assert not any("onnx" in line or "stdc++" in line for line in needed)
