"""`session`: ONNX Runtime with libportattn where it can run, saying whether it does."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime

from portattn import native
from portattn.errors import ExportError, NativeLibraryError
from portattn.export.expression import parse_program
from portattn.export.schema import ATTRIBUTES, DOMAIN, DTYPES, OP_NAME, OP_VERSION, REQUIRED_INPUTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

LOGGER = logging.getLogger("portattn.export")
MIN_ONNXRUNTIME = (1, 17)
_CPU = "CPUExecutionProvider"
_MARK = "portattn.registered"  # in session options: ONNX Runtime cannot tell what they hold


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxSession:
    """A session and how its attention runs.

    Attributes:
        inference_session: the `onnxruntime.InferenceSession`.
        uses_library: whether libportattn is registered; else attention runs by its function
            bodies.
        reason: why.
    """

    inference_session: onnxruntime.InferenceSession
    uses_library: bool
    reason: str

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
        """As `onnxruntime.InferenceSession.run`."""
        results: list[Any] = self.inference_session.run(output_names, feeds)
        return results


def session(
    path: str | os.PathLike[str],
    providers: Sequence[str] | None = None,
    *,
    session_options: onnxruntime.SessionOptions | None = None,
    use_library: bool | None = None,
) -> OnnxSession:
    """Open a model written by `to_onnx`.

    libportattn is registered when it can run every attention node: ONNX Runtime 1.17 or newer,
    only the CPU provider, float32 or float16, and a node of a version that it knows. Otherwise the
    function bodies in the file run. The choice and its reason are logged (logger
    ``portattn.export``) and returned. A model optimised and saved by a session with the library
    needs the library from then on.

    Args:
        path: the file.
        providers: as for `onnxruntime.InferenceSession`; None: the CPU provider.
        session_options: further options; the library is registered in them, here and not before.
        use_library: True: an error where it cannot be used; False: never; None: where it can.

    Raises:
        ExportError: ``use_library=True`` and it cannot be used, or the file is no ONNX model.
    """
    chosen = [_CPU] if providers is None else list(providers)
    options = onnxruntime.SessionOptions() if session_options is None else session_options
    reasons = ["use_library is False"] if use_library is False else refusals(path, chosen)
    if reasons and use_library:
        raise ExportError(
            f"libportattn cannot run {os.fspath(path)}: {'; '.join(reasons)}. Pass "
            "use_library=None to run it "
            "by its function bodies"
        )
    _register(options, wanted=not reasons)
    reason = "; ".join(reasons) or f"{native.library_path().name} runs its attention"
    how = "with libportattn" if not reasons else "by its function bodies"
    LOGGER.info("%s runs %s: %s", Path(path).name, how, reason)
    return OnnxSession(
        onnxruntime.InferenceSession(os.fspath(path), options, providers=chosen),
        not reasons,
        reason,
    )


def _register(options: onnxruntime.SessionOptions, *, wanted: bool) -> None:
    """Have libportattn in the options or not; options that an earlier session used may hold it."""
    try:
        holds_it = options.get_session_config_entry(_MARK) == "1"
    except RuntimeError:  # what ONNX Runtime raises for an entry that was never made
        holds_it = False
    if holds_it and not wanted:
        raise ExportError(
            "session_options hold libportattn from an earlier session, and this model is to "
            "run without it; pass fresh SessionOptions"
        )
    if wanted and not holds_it:
        options.register_custom_ops_library(str(native.library_path()))
        options.add_session_config_entry(_MARK, "1")


def refusals(path: str | os.PathLike[str], providers: Sequence[Any]) -> list[str]:
    """Why libportattn cannot run a model; empty if it can."""
    reasons = []
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < MIN_ONNXRUNTIME:
        reasons.append(
            f"onnxruntime is {onnxruntime.__version__}, the library needs 1.17 or newer"
        )
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    others = [name for name in names if name != _CPU]
    if others:
        reasons.append(
            "the library has CPU kernels, which would take attention away from "
            f"{', '.join(others)}"
        )
    try:
        native.library()
    except NativeLibraryError as error:
        reasons.append(str(error))
    return reasons + _model_refusals(path)


def _model_refusals(path: str | os.PathLike[str]) -> list[str]:
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:
        raise ExportError(
            f"path is {os.fspath(path)!r}, which cannot be read as an ONNX model: {error}. Pass "
            "a file "
            "written by portattn.export.to_onnx"
        ) from error
    nodes = [
        node
        for node in _all_nodes(model.graph)
        if (node.domain, node.op_type) == (DOMAIN, OP_NAME)
    ]
    if not nodes:
        return [f"the model has no {DOMAIN}::{OP_NAME} node"]
    versions = [opset.version for opset in model.opset_import if opset.domain == DOMAIN]
    if any(version > OP_VERSION for version in versions):
        return [
            f"the model has version {max(versions)} of the node, the library knows {OP_VERSION}"
        ]
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    types |= {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    types |= {value.name: value.data_type for value in model.graph.initializer}
    return [reason for node in nodes for reason in _node_refusals(node, types)]


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside them (If, Loop)."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_nodes(inner)


def _node_refusals(node: onnx.NodeProto, types: Mapping[str, int]) -> list[str]:
    reasons = []
    for name in node.input[: len(REQUIRED_INPUTS)]:
        # A type that the file does not tell is left to ONNX Runtime.
        if name in types and types[name] not in DTYPES:
            dtype = onnx.TensorProto.DataType.Name(types[name])
            reasons.append(f"{node.name} has {dtype} inputs, the library has float32 and float16")
            break
    attributes = {attribute.name: attribute for attribute in node.attribute}
    unknown = sorted(set(attributes) - set(ATTRIBUTES))
    if unknown:
        reasons.append(
            f"{node.name} has the attributes {unknown}, which this version does not know"
        )
    try:
        parse_program(attributes["program"].ints if "program" in attributes else ())
    except ExportError as error:
        reasons.append(f"{node.name}: {error}")
    return reasons
