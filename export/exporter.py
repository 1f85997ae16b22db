"""`to_onnx`: a torch module with portattn attention as an ONNX file that runs anywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx
import torch

from portattn.errors import ExportError
from portattn.export.attach import BodyInfo, attach_bodies
from portattn.export.calls import check_calls
from portattn.export.schema import OPSET, registered_schema
from portattn.export.translate import translation_table

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# What torch.export.export takes: dicts, tuples and lists of sizes, names, Dims and None.
DynamicShapes: TypeAlias = Any
Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class ExportInfo:
    """What `to_onnx` wrote.

    Attributes:
        path: the file.
        attention: one entry for each attention node, in graph order.
    """

    path: Path
    attention: tuple[BodyInfo, ...]


def to_onnx(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    external_data: bool | None = None,
) -> ExportInfo:
    """Export a module to ONNX, opset 23.

    Each portattn attention becomes one ``com.portattn::Attention`` node, which carries a function
    body in standard ops: the file runs in any ONNX Runtime with opset 23 (1.23 and newer), and
    with libportattn registered (`portattn.export.session`) it runs portattn's kernel. Masks with
    structure (windows, global tokens, drawn blocks, strides) have bodies that need
    O(seqlen * window) memory.

    Args:
        module: float32 or float16; exported as in eval mode, and left in the mode that it is in.
        args: example inputs.
        path: the file to write. Weights above 2 GiB go to a file beside it.
        kwargs: example keyword inputs.
        dynamic_shapes: as in `torch.export.export`; e.g. ``({0: "batch", 2: "seqlen"},)`` in which
            strings name dynamic sizes.
        input_names, output_names: names in the ONNX graph.
        external_data: write weights to a file beside ``path``; None: only where they need it.

    Returns:
        The path, and for each attention node its mask and kind of body.

    Raises:
        ExportError: the module cannot be captured, or an attention in it cannot be expressed
            (bfloat16 or float64, heads or head_dim of dynamic size, RandomBlocks with kv_lengths).
    """
    path = Path(path)
    with _eval_mode(module):
        program = _capture(module, args, kwargs, dynamic_shapes)
    check_calls(program)
    with registered_schema():
        try:
            with torch.no_grad(), _quiet():
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=OPSET,
                    custom_translation_table=translation_table(),
                    input_names=input_names,
                    output_names=output_names,
                    dynamic_shapes=_mapped(
                        dynamic_shapes, torch.export.Dim, lambda dim: dim.__name__
                    ),
                    verbose=False,
                )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(
                f"torch.onnx cannot export {type(module).__name__}: {_root(error)}. Replace the "
                "operator named "
                "there, or export the part of the module around attention"
            ) from error
        assert exported is not None
        infos = attach_bodies(exported.model)
        exported.save(path, external_data=external_data)
        try:
            onnx.checker.check_model(os.fspath(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(
                f"the model written to {path} does not pass onnx.checker: {error}"
            ) from error
    return ExportInfo(path, infos)


def _capture(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: DynamicShapes,
) -> ExportedProgram:
    if not isinstance(args, tuple):
        raise ExportError(
            f"args is {type(args).__name__}; it must be a tuple of example inputs: for one "
            "input, (x,)"
        )
    made: dict[str, Any] = {}
    # Equal names are one dimension.
    shapes = _mapped(
        dynamic_shapes, str, lambda name: made.setdefault(name, torch.export.Dim(name))
    )
    args, named = _unshared((args, dict(kwargs or {})))
    try:
        with torch.no_grad():
            return torch.export.export(
                module,
                args,
                named,
                dynamic_shapes=shapes,
                strict=False,
            )
    except Exception as error:
        raise ExportError(
            f"torch.export cannot capture {type(module).__name__}: {_root(error)}. Make its "
            "forward free of "
            "control flow that depends on data, leave the dimension named there out of "
            "dynamic_shapes, or give "
            "example inputs that are 2 or longer along dynamic dimensions (torch.export takes 0 "
            "and 1 as fixed)"
        ) from error


@contextlib.contextmanager
def _eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """The module in eval mode inside, each part back in its own mode after."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on itself: a deprecated class, no torchvision."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            same = r"# The axis name: (\S+) will not be used.* with another axis: \1\.$"
            warnings.filterwarnings("ignore", same, UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _unshared(inputs: Inputs) -> Inputs:
    """The inputs with a copy in place of each tensor that stands there twice.

    torch.export would take the two for one input of the graph for ever.
    """
    seen: set[int] = set()

    def unshared(item: object) -> object:
        if not isinstance(item, torch.Tensor):
            return item
        if id(item) in seen:
            return item.clone()
        seen.add(id(item))
        return item

    result: Inputs = torch.utils._pytree.tree_map(unshared, inputs)
    return result


def _mapped(shapes: DynamicShapes, kind: type, convert: Callable[[Any], object]) -> DynamicShapes:
    """dynamic_shapes with each item of a kind converted."""
    if isinstance(shapes, kind):
        return convert(shapes)
    if isinstance(shapes, Mapping):
        return {name: _mapped(value, kind, convert) for name, value in shapes.items()}
    if isinstance(shapes, (tuple, list)):
        return tuple(_mapped(value, kind, convert) for value in shapes)
    return shapes


def _root(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(".")
