import logging

import onnx
import onnxruntime
import pytest

from portattn import export, native
from portattn.errors import ExportError
from portattn.export.sessions import refusals
from tests.export.node_models import make_call

CPU = ["CPUExecutionProvider"]


def save(model, folder):
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def test_says_what_it_chose(exported, caplog):
    with caplog.at_level(logging.INFO, logger="portattn.export"):
        opened = export.session(exported.path)
        bare = export.session(exported.path, use_library=False)
    assert opened.uses_library
    assert not bare.uses_library
    assert "use_library is False" in bare.reason
    assert "with libportattn" in caplog.messages[0]
    assert "by its function bodies" in caplog.messages[1]


def test_options_may_be_used_again(exported):
    options = onnxruntime.SessionOptions()
    for _ in range(2):
        assert export.session(exported.path, session_options=options).uses_library
    with pytest.raises(ExportError, match="pass fresh SessionOptions"):
        export.session(exported.path, session_options=options, use_library=False)


def test_other_providers_run_the_bodies(exported):
    reasons = refusals(exported.path, [("CUDAExecutionProvider", {"device_id": 0}), *CPU])
    assert len(reasons) == 1
    assert "away from CUDAExecutionProvider" in reasons[0]


def test_missing_library_runs_the_bodies(exported, monkeypatch):
    native.library.cache_clear()
    monkeypatch.setenv("PORTATTN_LIBRARY", "/nowhere/libportattn.so")
    try:
        opened = export.session(exported.path)
    finally:
        native.library.cache_clear()
    assert not opened.uses_library
    assert "cannot be loaded" in opened.reason


def test_old_onnxruntime_runs_the_bodies(exported, monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", "1.16.3")
    assert "1.17 or newer" in refusals(exported.path, CPU)[0]


def test_newer_nodes_run_their_bodies(tmp_path):
    model = make_call(None, 8, 8).model()
    model.opset_import[1].version = 2
    assert "has version 2 of the node" in refusals(save(model, tmp_path), CPU)[0]
    model.opset_import[1].version = 1
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("rotary", 1))
    assert "['rotary']" in refusals(save(model, tmp_path), CPU)[0]
    del model.graph.node[0].attribute[-1]
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("program", [1, 99]))
    assert "cannot be read at position 1" in refusals(save(model, tmp_path), CPU)[0]


def test_other_dtypes_run_their_bodies(tmp_path):
    model = make_call(None, 8, 8).model()
    for value in model.graph.input:
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    assert "has DOUBLE inputs" in refusals(save(model, tmp_path), CPU)[0]


def test_library_on_demand_is_an_error_where_it_cannot_run(tmp_path):
    model = make_call(None, 8, 8).model()
    model.graph.node[0].domain = "other"
    with pytest.raises(ExportError, match=r"no com\.portattn::Attention node"):
        export.session(save(model, tmp_path), use_library=True)
    (tmp_path / "model.onnx").write_text("nothing")
    with pytest.raises(ExportError, match="cannot be read as an ONNX model"):
        export.session(tmp_path / "model.onnx")
