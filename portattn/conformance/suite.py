"""Runs cases on kernels and judges what comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING

import torch

from portattn import call, dispatch
from portattn.backends import registry
from portattn.conformance.cases import CASES, Case
from portattn.conformance.compare import Comparison, compare
from portattn.conformance.inputs import Inputs, draw
from portattn.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CANARY_ELEMENTS = 64  # on both sides of an output
_CANARY_BYTE = 0x5A


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one case on one kernel in one dtype.

    Attributes:
        kernel, case, dtype: names.
        status: ``"pass"``, ``"fail"`` or ``"refused"``.
        output, lse: the comparisons; None where nothing was computed.
        detail: why it failed or was refused.
        gradients: those of gradients by their input's name (gradients.gradient_outcome).
    """

    kernel: str
    case: str
    dtype: str
    status: str
    output: Comparison | None = None
    lse: Comparison | None = None
    detail: str = ""
    gradients: tuple[tuple[str, Comparison], ...] = ()


def kernels(backends: list[str] | None = None) -> list[str]:
    """The kernels that backend (or kernel) names stand for, in the registry's order; all for None.

    Raises:
        ConfigError: an unknown name.
    """
    if backends is None:
        return list(registry.KERNELS)
    named = {name for backend in backends for name in dispatch.candidates(backend)}
    return [name for name in registry.KERNELS if name in named]


def outcome(kernel: str, case: Case, dtype: str, device: str = "cpu") -> Outcome:
    """Run one case twice and judge it.

    Args:
        kernel: a name of registry.KERNELS.
        case: the case.
        dtype: a name of DTYPES.
        device: a torch device string.
    """
    inputs, reference, eager = _expected(case, dtype, device)
    options = inputs.options._replace(backend=kernel)
    judged: list[tuple[Comparison, Comparison]] = []
    results = []
    try:
        is_eager = registry.KERNELS[kernel][0] == "reference"
        for _ in range(2):
            with single_thread() if is_eager else contextlib.nullcontext():
                output, lse = _run(dataclasses.replace(inputs, options=options))
            results.append((output, lse))
            judged.append(
                tuple(  # type: ignore[arg-type]
                    compare(name, got, plain, law, dtype=DTYPES[dtype], poisoned=bool(case.poison))
                    for name, got, plain, law in zip(
                        ("output", "lse"), (output, lse), eager, reference, strict=True
                    )
                )
            )
    except UnsupportedError as error:
        reasons = "; ".join(error.reasons.get(kernel, [str(error)]))
        return Outcome(kernel, case.name, dtype, "refused", detail=reasons)
    except (
        Exception
    ) as error:  # a crash of one kernel is that kernel's result, and the suite goes on
        return Outcome(kernel, case.name, dtype, "fail", detail=f"{type(error).__name__}: {error}")
    fault = _fault(judged, results)
    status = "fail" if fault else "pass"
    return Outcome(kernel, case.name, dtype, status, *judged[-1], fault)


def check(kernel: str, case: str, dtype: str, device: str = "cpu") -> Outcome:
    """`outcome`, for tests.

    Raises:
        AssertionError: the case fails. A refusal is returned, for the test to compare with what
            it expects.
    """
    result = outcome(kernel, CASES[case], dtype, device)
    if result.status == "fail":
        raise AssertionError(f"{kernel}, case {case}, {dtype} on {device}: {result.detail}")
    return result


@functools.lru_cache(maxsize=8)
def _expected(
    case: Case, dtype: str, device: str
) -> tuple[Inputs, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The inputs, and (output, LSE) of the float64 reference and of the eager computation.

    Both are computed on the CPU, so that every device is held to the same yardstick: a GPU library
    sums a decode row's products in many parallel parts, with an error that no one loop reaches.
    """
    with single_thread():
        inputs = draw(case, DTYPES[dtype], "cpu")
        law = _reference(inputs.to(torch.float64), "float64")
        eager = _reference(inputs, "input")
        inputs = draw(case, DTYPES[dtype], device)
    return inputs, _move(law, device), _move(eager, device)


def _move(tensors: tuple[torch.Tensor, ...], device: str) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Small tensors: threads that wait for each other cost up to 25x on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _reference(inputs: Inputs, compute_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    options = inputs.options._replace(backend="reference", config=(("dtype", compute_dtype),))
    output, lse = call.run(inputs.query, inputs.key, inputs.value, inputs.terms, options)
    assert lse is not None  # options ask for it
    return output, lse


def _run(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """One run into outputs that hold NaN, with canaries around them.

    Raises:
        AssertionError: it wrote outside its outputs, or into its inputs.
    """
    like = call.empty_output(inputs.query, inputs.value)
    output, output_memory = guarded(like)
    lse, lse_memory = guarded(torch.empty_like(like[..., 0], dtype=call.lse_dtype(inputs.query)))
    with unchanged(inputs):
        call.run_into(
            inputs.query, inputs.key, inputs.value, inputs.terms, inputs.options, output, lse
        )
        for name, tensor, memory in (("output", output, output_memory), ("lse", lse, lse_memory)):
            if not is_intact(tensor, memory):
                raise AssertionError(f"it wrote outside its {name}")
    return output, lse


@contextlib.contextmanager
def unchanged(inputs: Inputs) -> Iterator[None]:
    """What is done inside must leave the inputs as they are.

    Raises:
        AssertionError: it did not.
    """
    before = [tensor.clone() for tensor in _tensors(inputs)]
    yield
    for tensor, copy in zip(_tensors(inputs), before, strict=True):
        if not same_bits(tensor, copy):
            raise AssertionError("it changed one of its inputs")


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    terms = [term for term in inputs.terms if term is not None]
    return [inputs.query, inputs.key, inputs.value, *terms]


def guarded(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A NaN-filled tensor like ``like``, and its memory with the canaries, as bytes."""
    count = like.numel() + 2 * _CANARY_ELEMENTS
    flat = torch.empty(count, dtype=like.dtype, device=like.device)
    memory = flat.view(torch.uint8)
    memory.fill_(_CANARY_BYTE)
    # empty_like of a permuted tensor keeps its dense layout, so its strides fit the flat memory.
    dense = torch.empty_like(like)
    return flat.as_strided(dense.shape, dense.stride(), _CANARY_ELEMENTS).fill_(torch.nan), memory


def is_intact(tensor: torch.Tensor, memory: torch.Tensor) -> bool:
    """Whether the canaries of `guarded` are still there."""
    size = _CANARY_ELEMENTS * tensor.element_size()
    ends = torch.cat((memory[:size], memory[-size:]))
    return bool((ends == _CANARY_BYTE).all())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _fault(
    judged: list[tuple[Comparison, Comparison]],
    results: list[tuple[torch.Tensor, torch.Tensor]],
) -> str:
    """The first thing that is wrong, or ""."""
    for run, comparisons in enumerate(judged, start=1):
        for name, comparison in zip(("output", "lse"), comparisons, strict=True):
            if comparison.fault:
                return f"run {run}: {comparison.fault}"
            if not comparison.passes:
                return (
                    f"run {run}: {name} is off by {comparison.error:.3g}; allowed is "
                    f"{comparison.allowed:.3g} (eager {comparison.eager_error:.3g})"
                )
    (first, first_lse), (second, second_lse) = results
    if not (same_bits(first, second) and same_bits(first_lse, second_lse)):
        return "two runs on the same inputs differ"
    return ""
