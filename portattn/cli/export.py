"""``portattn export``: a module named by its import path as an ONNX file."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from portattn.errors import ExportError

if TYPE_CHECKING:
    import torch

    from portattn.export import ExportInfo

_DTYPES = ("float32", "float16", "int64", "int32", "bool")
_INPUT = re.compile(r"(?P<sizes>[^:]+)(:(?P<dtype>\w+))?")
_SIZE = re.compile(r"((?P<name>[A-Za-z_]\w*)=)?(?P<value>\d+)")


def export(
    module: Annotated[
        str,
        typer.Argument(
            help="package.module:name of a torch module, or of a function that returns one."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The ONNX file to write.")],
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            help="One example input, in order: sizes and dtype, e.g. "
            "batch=2,8,seqlen=128,64:float32. A size with a name is dynamic.",
        ),
    ],
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Write weights to a file beside the model.")
    ] = False,
    check: Annotated[
        bool, typer.Option(help="Run the file in ONNX Runtime and compare it with torch.")
    ] = True,
) -> None:
    """Export a module that uses portattn's attention to ONNX.

    Prints what each attention became. With --check (the default) the file is run by its function
    bodies and, where it can be, by libportattn, at the example's sizes and at others; exits with 1
    if a result differs from torch's.
    """
    import torch

    from portattn.export import to_onnx

    console = Console()
    loaded = _load(module)
    specs = [_parse_input(text) for text in inputs]
    torch.manual_seed(0)
    shapes = tuple({n: name for n, (name, _) in enumerate(sizes) if name} for sizes, _ in specs)
    external = True if external_data else None
    info = to_onnx(
        loaded, _example(specs, 0), output, dynamic_shapes=shapes, external_data=external
    )
    _print(console, info)
    if check and not _agrees(console, loaded, specs, output):
        raise typer.Exit(1)


def _load(path: str) -> torch.nn.Module:
    import torch

    name, _, attribute = path.partition(":")
    if not name or not attribute:
        raise ExportError(f"module is {path!r}; it must be package.module:name")
    if "" not in sys.path:
        sys.path.insert(0, "")  # what stands in the working folder can be named too
    try:
        found = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise ExportError(
            f"module is {path!r}, which cannot be imported: {error}. Run from the folder that "
            "holds the "
            "package, or install it"
        ) from error
    if not isinstance(found, torch.nn.Module) and callable(found):
        found = found()
    if not isinstance(found, torch.nn.Module):
        raise ExportError(
            f"module is {path!r}, a {type(found).__name__}; it must be a torch.nn.Module or a "
            "function "
            "without arguments that returns one"
        )
    return found.eval()


Spec = tuple[list[tuple[str | None, int]], str]


def _parse_input(text: str) -> Spec:
    """Named or plain sizes, and the dtype."""
    whole = _INPUT.fullmatch(text)
    sizes = (
        [_SIZE.fullmatch(part.strip()) for part in whole["sizes"].split(",")] if whole else [None]
    )
    dtype = (whole["dtype"] if whole else None) or "float32"
    if None in sizes or dtype not in _DTYPES:
        raise ExportError(
            f"--input is {text!r}; it must be sizes and a dtype of {', '.join(_DTYPES)}: "
            "batch=2,8,seqlen=128,64:float32"
        )
    return [(size["name"], int(size["value"])) for size in sizes if size], dtype


def _example(specs: list[Spec], longer: int) -> tuple[torch.Tensor, ...]:
    """Random inputs; dynamic sizes ``longer`` than said."""
    import torch

    tensors = []
    for sizes, dtype in specs:
        shape = [size + (longer if name else 0) for name, size in sizes]
        kind = getattr(torch, dtype)
        # Integers are most often ids or flags: 0 and 1 are valid for nearly all.
        floating = kind.is_floating_point
        tensors.append((torch.randn(shape) if floating else torch.randint(0, 2, shape)).to(kind))
    return tuple(tensors)


def _print(console: Console, info: ExportInfo) -> None:
    table = Table(title=str(info.path))
    for heading in ("attention node", "mask", "without libportattn"):
        table.add_column(heading)
    for node in info.attention:
        memory = "O(seqlen)" if node.body == "gathered" else "O(seqlen_q * seqlen_k)"
        table.add_row(node.node, node.mask, f"{node.body}, memory {memory}")
    console.print(table)
    if not info.attention:
        console.print("the module has no portattn attention: the file is plain ONNX")


def _agrees(console: Console, module: torch.nn.Module, specs: list[Spec], path: Path) -> bool:
    """Whether the file gives what torch gives, in each way that it can run here."""
    import torch

    from portattn.export import session

    agrees = True
    lengths = (0, 5) if any(name for sizes, _ in specs for name, _ in sizes) else (0,)
    for use_library in (None, False):
        opened = session(path, use_library=use_library)
        how = "libportattn" if opened.uses_library else "function bodies"
        if use_library is None and not opened.uses_library:
            console.print(f"libportattn is not used: {opened.reason}")
            continue
        names = [value.name for value in opened.inference_session.get_inputs()]
        for longer in lengths:
            tensors = _example(specs, longer)
            feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
            with torch.no_grad():
                wanted = torch.utils._pytree.tree_leaves(module(*tensors))
            results = opened.run(None, feeds)
            errors = [
                _relative_error(torch.from_numpy(got), want)
                for got, want in zip(results, wanted, strict=True)
            ]
            fits = all(error <= 1.0 for error in errors)
            agrees &= fits
            where = "at the example's sizes" if not longer else f"dynamic sizes {longer} longer"
            verdict = "agrees with torch" if fits else "DIFFERS from torch"
            console.print(f"{how}, {where}: {verdict}", highlight=False)
    return agrees


def _relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, 1.0 being what is allowed: 64 roundings of the largest value."""
    import torch

    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not want.numel():
        return 0.0
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    eps = torch.finfo(want.dtype).eps
    finite = want.isfinite()
    if not torch.equal(got[~finite].nan_to_num(), want[~finite].nan_to_num()):
        return float("inf")
    got, want = got[finite].double(), want[finite].double()
    if not want.numel():
        return 0.0
    allowed = 64 * eps * max(float(want.abs().max()), 1e-3)
    return float((got - want).abs().max()) / allowed
