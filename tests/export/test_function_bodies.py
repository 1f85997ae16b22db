"""One node, by its function body in stock ONNX Runtime and by the kernel."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from portattn import masks
from portattn.export.function_body import build_function
from portattn.masks import (
    BlockBand,
    KeyRange,
    KeySet,
    QueryRange,
    QuerySet,
    RandomBlocks,
    Segments,
    per_batch,
    per_head,
)
from tests.export.node_models import (
    check,
    library_options,
    make_call,
    run_library,
    run_stock,
)
from tests.presets import PRESETS

IDS = torch.randint(0, 4, (2, 200), generator=torch.Generator().manual_seed(0))
TABLES = torch.rand(2, 1, 25, 25, generator=torch.Generator().manual_seed(1)) < 0.4
COMPOSED = {
    "window and padding": masks.sliding_window(20) & masks.padding(torch.tensor([70, 20])),
    "documents and causal": masks.documents(torch.tensor([0, 30, 50, 200])) & masks.causal(),
    "segments of each batch and local": Segments(IDS, IDS) & masks.local(8, 8),
    "tables of each batch": masks.block_sparse(TABLES, 8),
    "tables of each batch and local": masks.block_sparse(TABLES, 8) & masks.local(20, 20),
    "tables of each head": masks.block_sparse(TABLES[0].expand(4, 25, 25).contiguous(), 8),
    "table, band and draws": masks.block_sparse(TABLES[0, 0], 8)
    | masks.block_sparse(TABLES[1, 0], 8)
    | masks.local(9, 3)
    | RandomBlocks(8, 2, 1),
    "not a window": ~masks.sliding_window(20),
    "causal, not near": masks.causal() & ~masks.local(2, 2),
    "per head, one dense": per_head(
        [masks.causal(), masks.sliding_window(8), masks.sliding_window(8), masks.longformer(8, 2)]
    ),
    "per head, bands": per_head([masks.local(n, 2) for n in (1, 2, 3, 9)]),
    "per batch of per head": per_batch(
        [masks.local(3, 3), per_head([masks.local(n, n) for n in (1, 2, 3, 4)])]
    ),
    "rows with nothing": masks.sliding_window(8) & KeyRange(50, 80),
    "query set": QuerySet(torch.tensor([3, 50, 90])) | masks.local(3, 3),
    "blocks without some keys": BlockBand(10, -1, 2) & ~KeySet(torch.tensor([1, 2, 60])),
    "two draws": RandomBlocks(8, 3, 2**63 - 1) | RandomBlocks(8, 2, 9) | masks.local(2, 2),
    "more draws than blocks": RandomBlocks(8, 16, 2**61) & masks.causal(),
    "draws of two sizes": RandomBlocks(8, 2, 1) | RandomBlocks(12, 1, 1),
    "globals past the keys": masks.longformer(8, [3, 110]) | KeySet(torch.tensor([115, 130])),
    "all but many keys": ~KeyRange(7, None) | masks.local(1, 1),
    "strided with globals": masks.sparse_transformer_strided(16)
    | KeyRange(0, 5)
    | QueryRange(0, 3),
}
# seqlen_q, seqlen_k, how the queries stand
LENGTHS = [(37, 120, "end"), (90, 41, "start")]


def both(call):
    """Body and kernel give what torch gives."""
    model = call.model()
    check(run_stock(model, call.feeds), call)
    check(run_library(model, call.feeds), call)


@pytest.mark.parametrize("case", PRESETS, ids=lambda case: case.name)
def test_presets(case):
    heads = case.num_heads if case.num_heads > 1 else 4
    for seqlen_q, seqlen_k, mode in LENGTHS:
        sizes = {"batch": case.batch, "heads": heads, "kv_heads": heads // 2, "mode": mode}
        both(make_call(case.mask, seqlen_q, seqlen_k, return_lse=mode == "end", **sizes))


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_masks(name):
    for seqlen_q, seqlen_k, mode in LENGTHS:
        both(make_call(COMPOSED[name], seqlen_q, seqlen_k, mode=mode, return_lse=mode == "start"))


CONSTANT = [
    "documents and causal",
    "segments of each batch and local",
    "tables of each batch",
    "tables of each batch and local",
    "table, band and draws",
    "tables of each head",
]


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_data_gives_gathered_bodies(name):
    for seqlen_q, seqlen_k, mode in LENGTHS:
        call = make_call(COMPOSED[name], seqlen_q, seqlen_k, mode=mode, constant=True)
        assert call.signature.cover is not None
        check(run_stock(call.model(), call.feeds), call)


TERM_MASKS = {
    "all": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(20),
    "bigbird": masks.bigbird(8, 2, 3, 1, seed=3),
    "strided": masks.sparse_transformer_strided(16),
    "per head": COMPOSED["per head, bands"],
}


@pytest.mark.parametrize("name", TERM_MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_score_terms(name, dtype):
    is_half = dtype == torch.float16
    shared = {"dtype": dtype, "mode": "value", "q_offset": 13, "softcap": 5.0}
    terms = ("alibi", "sinks", "bias")
    both(make_call(TERM_MASKS[name], 50, 90, terms=terms, return_lse=is_half, **shared))
    terms = ("alibi_batch", "bias_row")
    both(make_call(TERM_MASKS[name], 50, 90, terms=terms, scale=-0.4, **shared))


def test_scale_of_zero():
    both(make_call(masks.sliding_window(20), 50, 90, terms=("bias",), scale=0.0))


@pytest.mark.parametrize("name", ["all", "causal", "window", "per head"])
@pytest.mark.parametrize("seqlen_q", [1, 3, 20])
def test_kv_lengths(name, seqlen_q):
    batch = 2 if name == "per head" else 4
    call = make_call(
        TERM_MASKS[name], seqlen_q, 90, batch=batch, terms=("kv_lengths",), return_lse=True
    )
    both(call)
    # What lies past a length reaches nothing, not even as NaN.
    exact = call.attention()
    call.tensors["K"][1, :, 45:] = torch.nan
    call.tensors["V"][1, :, 45:] = torch.nan
    for run in (run_stock, run_library):
        output = torch.from_numpy(run(call.model(), call.feeds)[0])
        torch.testing.assert_close(output.double(), exact[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", TERM_MASKS)
def test_equal_lengths_and_one_query(name):
    both(make_call(TERM_MASKS[name], 100, 100, mode="unset"))
    both(make_call(TERM_MASKS[name], 1, 61, mode="end", return_lse=True))


def test_kv_lengths_with_tables_and_ids():
    for mask in (
        masks.block_sparse(TABLES[0, :1].expand(4, 25, 25).contiguous(), 8),
        masks.block_sparse(TABLES[0, 0], 8) | QuerySet(torch.tensor([89])),
        Segments(IDS, IDS),
    ):
        both(make_call(mask, 3, 90, terms=("kv_lengths",)))


def test_q_offset_as_an_input():
    call = make_call(masks.sliding_window(20), 30, 90, mode="value")
    call.tensors["q_offset_input"] = torch.tensor([41])
    both(call)


@pytest.mark.parametrize("name", ["all", "causal", "window", "bigbird", "strided"])
@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_empty_lengths(name, sizes):
    call = make_call(TERM_MASKS[name], *sizes, return_lse=True)
    for run in (run_stock, run_library):
        output, lse = run(call.model(), call.feeds)
        assert output.shape == (2, 4, sizes[0], 24)
        if sizes == (5, 0):
            assert not output.any()
            assert np.isneginf(lse).all()
    empty = make_call(TERM_MASKS[name], 5, 5, batch=0)
    assert run_library(empty.model(), empty.feeds)[0].shape == (0, 4, 5, 24)
    assert run_stock(empty.model(), empty.feeds)[0].shape == (0, 4, 5, 24)


def test_nan_at_a_kept_key_reaches_the_row():
    call = make_call(masks.sliding_window(4), 40, 40, batch=1)
    call.tensors["V"][0, :, 10] = torch.nan
    for run in (run_stock, run_library):
        output = run(call.model(), call.feeds)[0]
        assert np.isnan(output[:, :, 10:14]).all()


@pytest.mark.parametrize(
    "name", ["window and padding", "two draws", "strided with globals", "query set"]
)
def test_reference_evaluator(name):
    """The body is standard ONNX, not what ONNX Runtime makes of it."""
    call = make_call(COMPOSED[name], 41, 117, mode="end", return_lse=True)
    check(ReferenceEvaluator(call.model()).run(None, call.feeds), call)


def test_unset_q_offset_stops_at_unequal_lengths():
    model = make_call(masks.causal(), 8, 8, mode="unset").model()
    call = make_call(masks.causal(), 5, 8, mode="unset")
    with pytest.raises(Exception, match="portattn_needs_q_offset"):
        run_stock(model, call.feeds)
    with pytest.raises(Exception, match="seqlen_q is 5 and seqlen_k 8"):
        run_library(model, call.feeds)


def test_library_replaces_the_whole_body(tmp_path):
    call = make_call(masks.longformer(16, 2), 40, 40)
    onnx.checker.check_model(call.model(), full_check=True)
    options = library_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(call.model().SerializeToString(), options)
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert [(node.domain, node.op_type) for node in nodes] == [("com.portattn", "Attention")]


def test_kernel_needs_no_body():
    call = make_call(masks.causal(), 20, 20)
    model = call.model()
    del model.functions[:]
    check(run_library(model, call.feeds), call)


def test_equal_nodes_share_a_body():
    first, second = make_call(masks.causal(), 8, 8), make_call(masks.causal(), 30, 30)
    assert build_function(first.signature) == build_function(second.signature)
    assert first.signature.overload != make_call(masks.local(1, 1), 8, 8).signature.overload
