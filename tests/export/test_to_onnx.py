import onnx
import onnxruntime
import pytest
import torch

import portattn
from portattn import export, masks
from portattn.errors import ExportError
from tests.export.conftest import SIZES, Attention, inputs

NOT_TRACED = [(1, 33, 77), (3, 50, 50), (1, 1, 90), (2, 64, 64)]


@pytest.mark.parametrize("use_library", [True, False])
@pytest.mark.parametrize("name", ["exported", "exported_half"])
@pytest.mark.parametrize("sizes", NOT_TRACED)
def test_file_equals_torch_at_other_lengths(name, sizes, use_library, request):
    made = request.getfixturevalue(name)
    opened = export.session(made.path, use_library=use_library)
    assert opened.uses_library is use_library
    tensors = inputs(*sizes, made.dtype)
    feeds = dict(zip(("query", "key", "value"), (t.numpy() for t in tensors), strict=True))
    with torch.no_grad():
        want = made.module(*tensors)
    got = torch.from_numpy(opened.run(None, feeds)[0])
    tolerance = 2e-6 if made.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_one_file_runs_in_plain_onnxruntime(exported):
    session = onnxruntime.InferenceSession(str(exported.path))
    tensors = inputs(2, 21, 40)
    feeds = dict(zip(("query", "key", "value"), (t.numpy() for t in tensors), strict=True))
    with torch.no_grad():
        want = exported.module(*tensors)
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, feeds)[0]), want, atol=2e-6, rtol=0
    )


def test_info_says_what_each_node_became(exported, exported_half):
    first, second = exported.info.attention
    assert first.mask == "OR(BAND(-8, 8), KEY_SET(0), QUERY_SET(0))"
    assert second.mask == "BAND(-19, 0)"
    assert {node.body for node in exported.info.attention} == {"gathered"}
    assert first.overload != second.overload
    assert {node.body for node in exported_half.info.attention} == {"gathered"}


def test_file_holds_plain_nodes_and_bodies(exported):
    model = onnx.load(exported.path)
    nodes = [node for node in model.graph.node if node.domain == "com.portattn"]
    assert [node.op_type for node in nodes] == ["Attention", "Attention"]
    assert {function.overload for function in model.functions} == {node.overload for node in nodes}
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == 23
    # Mask data of a constant mask is an initialiser, and sizes keep their names.
    assert nodes[0].input[8] in {tensor.name for tensor in model.graph.initializer}
    names = [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert names[0] == "batch"
    assert names[2] == "queries"
    assert not any(onnx.defs.has("Attention", 1, domain) for domain in ("com.portattn",))


class WithTerms(torch.nn.Module):
    """Every optional argument, and the LSE."""

    def forward(self, query, key, value, bias, slopes, sinks):
        return portattn.attention(
            query,
            key,
            value,
            masks.sliding_window(20),
            q_offset="start",
            alibi_slopes=slopes,
            bias=bias,
            sinks=sinks,
            enable_gqa=True,
            return_lse=True,
            layout="bshd",
        )


def test_terms_layout_and_lse(tmp_path):
    tensors = tuple(tensor.transpose(1, 2) for tensor in inputs(2, 30, 50))
    terms = torch.randn(30, 50), torch.rand(4), torch.randn(4)
    path = tmp_path / "terms.onnx"
    export.to_onnx(WithTerms().eval(), (*tensors, *terms), path)
    for use_library in (True, False):
        opened = export.session(path, use_library=use_library)
        names = [value.name for value in opened.inference_session.get_inputs()]
        feeds = {n: t.contiguous().numpy() for n, t in zip(names, (*tensors, *terms), strict=True)}
        for got, want in zip(opened.run(None, feeds), WithTerms()(*tensors, *terms), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want, atol=3e-6, rtol=1e-5)


def test_one_tensor_for_two_inputs_stays_two_inputs(tmp_path):
    tensor = torch.randn(2, 4, 30, 16)
    module = Attention(None, None).eval()
    path = tmp_path / "shared.onnx"
    export.to_onnx(module, (tensor, tensor, tensor), path)
    session = onnxruntime.InferenceSession(str(path))
    assert [value.name for value in session.get_inputs()] == ["query", "key", "value"]
    tensors = [torch.randn(2, 4, 30, 16) for _ in range(3)]
    feeds = dict(zip(("query", "key", "value"), (t.numpy() for t in tensors), strict=True))
    with torch.no_grad():
        want = module(*tensors)
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, feeds)[0]), want, atol=2e-6, rtol=0
    )


def test_exported_as_in_eval_mode(tmp_path):
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(16, 16).eval())
    tensor = torch.randn(3, 16)
    export.to_onnx(module, (tensor,), tmp_path / "dropout.onnx")
    assert [part.training for part in module.modules()] == [True, True, False]
    opened = export.session(tmp_path / "dropout.onnx")
    assert "no com.portattn::Attention node" in opened.reason
    name = opened.inference_session.get_inputs()[0].name
    (got,) = opened.run(None, {name: tensor.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), module[1](tensor), atol=1e-6, rtol=1e-6)


def test_weights_beside_the_file(tmp_path):
    path = tmp_path / "weights.onnx"
    module = Attention(masks.causal(), None).eval()
    export.to_onnx(module, inputs(2, 30, 50), path, dynamic_shapes=SIZES, external_data=True)
    assert path.with_suffix(".onnx.data").exists()
    assert export.session(path).uses_library


class Branching(torch.nn.Module):
    """Control flow that depends on data."""

    def forward(self, query, key, value):
        if query.sum() > 0:
            return portattn.attention(query, key, value)
        return query


class WithLengths(torch.nn.Module):
    """RandomBlocks with kv_lengths."""

    def forward(self, query, key, value, lengths):
        mask = masks.RandomBlocks(8, 2, 1)
        return portattn.attention(query, key, value, mask, kv_lengths=lengths, enable_gqa=True)


def test_errors_name_the_way_out(tmp_path):
    path = tmp_path / "model.onnx"
    plain = Attention(None, None).eval()
    tensors = inputs(2, 30, 50)
    with pytest.raises(ExportError, match=r"args is Tensor; .*\(x,\)"):
        export.to_onnx(plain, tensors[0], path)
    narrow = Attention(None, None, torch.bfloat16).eval()
    with pytest.raises(ExportError, match=r"query has dtype bfloat16; .*module.half"):
        export.to_onnx(narrow, inputs(2, 30, 50, torch.bfloat16), path)
    with pytest.raises(ExportError, match=r"heads of query .* is dynamic"):
        export.to_onnx(plain, tensors, path, dynamic_shapes=({1: "h"}, {1: "g"}, {1: "g"}))
    with pytest.raises(ExportError, match="control flow that depends on data"):
        export.to_onnx(Branching().eval(), inputs(2, 30, 30), path)
    with pytest.raises(ExportError, match="2 or longer along dynamic dimensions"):
        export.to_onnx(plain, inputs(1, 30, 50), path, dynamic_shapes=SIZES)
    lengths = torch.tensor([50, 20], dtype=torch.int32)
    with pytest.raises(ExportError, match="RandomBlocks draws from all keys"):
        export.to_onnx(WithLengths().eval(), (*tensors, lengths), path)
    assert not path.exists()
