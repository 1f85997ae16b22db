"""Gradients of the cases: a kernel's backward against the reference's, by the rule for outputs.

One thing is added to the rule. A backward computes p = exp(s - LSE) and dS = p (dP - delta), with
delta = sum(dO O), from an LSE and a delta rounded to float32: an error of their size, whatever is
done with it after. So 2 * eps(float32) * (largest |LSE| + largest |delta|) * largest gradient is
allowed on top; dO is drawn from a normal distribution of variance 1.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import TYPE_CHECKING

import torch

from portattn import call
from portattn.backends.base import AttentionGradients
from portattn.conformance.cases import CASES
from portattn.conformance.compare import Comparison, compare
from portattn.conformance.inputs import Inputs, draw
from portattn.conformance.suite import (
    DTYPES,
    Outcome,
    guarded,
    is_intact,
    same_bits,
    single_thread,
    unchanged,
)
from portattn.errors import UnsupportedError

if TYPE_CHECKING:
    from portattn.conformance.cases import Case

# Decoding cases have many heads so that the eager error over their few rows is not luck; gradients
# by the keys have many rows anyway.
_MAX_HEADS = 64
NAMES = ("query", "key", "value", "alibi_slopes", "bias", "sinks")


@dataclasses.dataclass(frozen=True, slots=True)
class _Seeds:
    """Gradients of the loss by the output and the LSE."""

    output: torch.Tensor
    lse: torch.Tensor


def gradient_outcome(kernel: str, case: Case, dtype: str, device: str = "cpu") -> Outcome:
    """Differentiate one case and judge every gradient; again, twice, where it must repeat.

    Args:
        kernel: a name of registry.KERNELS.
        case: the case, without a NaN or inf among its values.
        dtype: a name of DTYPES.
        device: a torch device string.
    """
    if case.batch * case.num_heads > _MAX_HEADS:
        case = dataclasses.replace(case, batch=2, num_heads=8, num_kv_heads=8)
    inputs, seeds, scale, law, eager = _expected(case, dtype, device)
    try:
        runs = [
            _run(inputs, seeds, kernel, deterministic) for deterministic in (False, True, True)
        ]
    except UnsupportedError as error:
        reasons = "; ".join(error.reasons.get(kernel, [str(error)]))
        return Outcome(kernel, case.name, dtype, "refused", detail=reasons)
    except Exception as error:  # as in suite.outcome
        return Outcome(kernel, case.name, dtype, "fail", detail=f"{type(error).__name__}: {error}")
    judged = [
        {
            name: _judge(name, tensor, eager[name], law[name], DTYPES[dtype], scale)
            for name, tensor in found.items()
        }
        for found in runs
    ]
    fault = _fault(judged, runs)
    status = "fail" if fault else "pass"
    gradients = tuple(judged[0].items())
    return Outcome(kernel, case.name, dtype, status, detail=fault, gradients=gradients)


def check_gradients(kernel: str, case: str, dtype: str, device: str = "cpu") -> Outcome:
    """`gradient_outcome`, for tests.

    Raises:
        AssertionError: the case fails. A refusal is returned.
    """
    result = gradient_outcome(kernel, CASES[case], dtype, device)
    if result.status == "fail":
        raise AssertionError(
            f"gradients of {kernel}, case {case}, {dtype} on {device}: {result.detail}"
        )
    return result


@functools.lru_cache(maxsize=8)
def _expected(
    case: Case, dtype: str, device: str
) -> tuple[Inputs, _Seeds, float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs, seeds, largest |LSE| + |delta|, and the float64 and the eager gradients by name."""
    with single_thread():
        inputs = draw(case, DTYPES[dtype], "cpu")
        generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + 1)
        shape = (*inputs.query.shape[:3], inputs.value.shape[3])
        seed = torch.randn(shape, generator=generator).to(DTYPES[dtype])
        seeds = _Seeds(seed, torch.randn(shape[:3], generator=generator))
        law, output, lse = _differentiate(inputs.to(torch.float64), seeds, "reference", "float64")
        rounded = lse[lse.isfinite()], (output * seeds.output).sum(-1)
        eager, *_ = _differentiate(inputs, seeds, "reference", "input")
    scale = sum(float(one.abs().max()) if one.numel() else 0.0 for one in rounded)
    moved = [{name: tensor.to(device) for name, tensor in found.items()} for found in (law, eager)]
    seeds = _Seeds(seeds.output.to(device), seeds.lse.to(device))
    return draw(case, DTYPES[dtype], device), seeds, scale, moved[0], moved[1]


def _differentiate(
    inputs: Inputs,
    seeds: _Seeds,
    backend: str,
    compute_dtype: str = "",
    *,
    deterministic: bool = False,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The gradients by name, into NaN-filled tensors with canaries; the output and the LSE.

    Raises:
        AssertionError: it wrote outside a gradient.
    """
    config = (("dtype", compute_dtype),) if compute_dtype else None
    options = inputs.options._replace(backend=backend, config=config, deterministic=deterministic)
    tensors = (inputs.query, inputs.key, inputs.value)
    output, lse = call.run(*tensors, inputs.terms, options)
    assert lse is not None  # options ask for it
    terms = inputs.terms
    by_name = dict(
        zip(NAMES, (*tensors, terms.alibi_slopes, terms.bias, terms.sinks), strict=True)
    )
    held = {
        name: None if tensor is None else guarded(torch.empty_like(tensor))
        for name, tensor in by_name.items()
    }
    targets = {name: None if pair is None else pair[0] for name, pair in held.items()}
    gradients = AttentionGradients(
        seeds.output.to(output.dtype), seeds.lse.to(lse.dtype), **targets
    )
    call.run_backward(*tensors, terms, options, output, lse, gradients)
    for name, pair in held.items():
        if pair is not None and not is_intact(*pair):
            raise AssertionError(f"it wrote outside the gradient by {name}")
    return {name: tensor for name, tensor in targets.items() if tensor is not None}, output, lse


def _run(
    inputs: Inputs, seeds: _Seeds, kernel: str, deterministic: bool
) -> dict[str, torch.Tensor]:
    with unchanged(inputs):
        return _differentiate(inputs, seeds, kernel, deterministic=deterministic)[0]


def _judge(
    name: str,
    result: torch.Tensor,
    eager: torch.Tensor,
    law: torch.Tensor,
    dtype: torch.dtype,
    scale: float,
) -> Comparison:
    found = compare(name, result, eager, law, dtype=dtype, poisoned=False)
    if found.fault or law.numel() == 0:
        return found
    rounding = torch.finfo(torch.float32).eps * scale
    extra = 2 * rounding * float(law.abs().max())
    return dataclasses.replace(found, allowed=found.allowed + extra)


def _fault(judged: list[dict[str, Comparison]], runs: list[dict[str, torch.Tensor]]) -> str:
    """The first thing that is wrong, or ""."""
    for number, comparisons in enumerate(judged, start=1):
        for name, comparison in comparisons.items():
            if comparison.fault:
                return f"run {number}: gradient by {comparison.fault}"
            if not comparison.passes:
                return (
                    f"run {number}: gradient by {name} is off by {comparison.error:.3g}; allowed "
                    f"is {comparison.allowed:.3g} (eager {comparison.eager_error:.3g})"
                )
    for name, tensor in runs[1].items():
        if not same_bits(tensor, runs[2][name]):
            return f"two deterministic runs on the same inputs differ in the gradient by {name}"
    return ""
