"""Whether a config computes the right thing, before it may be timed: against float64.

The rule is that of the conformance suite: max|out - ref| <= 2 max|eager - ref| + 2 eps max|ref|,
where eager is the reference's computation in the inputs' own dtype (in float32 the last term takes
the largest value instead: the mean over many keys is much smaller). Checked are some blocks of
rows of the real problem (the first, the last and random ones: float64 over all of it would cost
more than the tuning), that no output is NaN or left unwritten and nothing beside it is written,
and the whole of two small problems of the same kind with ragged lengths, the second of which has
rows and sequences that attend to nothing.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import torch

from portattn.backends import registry
from portattn.tuner import errors
from portattn.tuner.inputs import (
    GUARD_BYTE,
    GUARD_BYTES,
    Guarded,
    edges,
    make,
    ragged,
    row_blocks,
    rows_of,
)

if TYPE_CHECKING:
    from portattn.backends.base import AttentionInputs, Config, Kernel
    from portattn.problem import AttentionProblem
    from portattn.tuner.cases import Case

RULE = "float64: error <= 2 eager + 2 eps largest"
SEEDS = (0, 1, 2)
_CHANGED = "it changed its inputs"
_AGAIN = "in another run (a race?): "
# Of the small problems: what depends on who comes first shows in one of them.
_REPEATS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What checking one config found.

    Attributes:
        status: ``"ok"``, or one of `portattn.tuning_db.schema.STATUSES`.
        reason: why it is not ok.
        max_abs_err: largest error of the outputs seen.
        max_rel_err: the same over the largest reference value.
        first_run_ns: time of the first run, compilation included.
    """

    status: str
    reason: str = ""
    max_abs_err: float | None = None
    max_rel_err: float | None = None
    first_run_ns: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Expected:
    """The truth for some query rows, and the errors allowed.

    Attributes:
        rows: which query rows, int64.
        output: float64 [batch, num_heads, rows, head_dim_v].
        lse: [batch, num_heads, rows], or None.
        output_tolerance, lse_tolerance: largest absolute errors allowed.
    """

    rows: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor | None
    output_tolerance: float
    lse_tolerance: float


class Verifier:
    """Checks configs on one case.

    Making one computes the references; `inputs` may be timed afterwards.

    Args:
        case: the problem.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        large = make(case, SEEDS[0])
        self.inputs = large.inputs
        self._large = _Check(case.problem, large, _expect(large.inputs, row_blocks(case)), "")
        self._small = tuple(
            _small_check(small, seed, shortest)
            for small, seed, shortest in zip(
                (ragged(case), edges(case)), SEEDS[1:], (None, 0), strict=True
            )
        )

    def check(self, kernel: Kernel, config: Config) -> Verdict:
        """Run a config on every problem and compare.

        An exception in the kernel is a verdict as well.
        """
        started = time.perf_counter_ns()
        try:
            _run(kernel, self.inputs, config)
            first_run_ns = time.perf_counter_ns() - started
            verdict = self._large.verdict()
            for small in self._small:
                if verdict.status != "ok":
                    break
                if not (
                    kernel.unsupported_reasons(small.problem)
                    or kernel.infeasible_reasons(small.problem, config)
                ):
                    verdict = _repeated(kernel, small, config, verdict)
        except (
            Exception
        ) as error:  # whatever a candidate raises ends the candidate, not the tuning
            return Verdict(_status_of(error), f"{type(error).__name__}: {str(error)[:1500]}")
        if verdict.reason.endswith(_CHANGED):
            self._restore()
        return dataclasses.replace(verdict, first_run_ns=first_run_ns)

    def after_timing(self, verdict: Verdict) -> Verdict:
        """The verdict on what the last of the timed runs left: a race need not show at once."""
        again = self._large.verdict()
        return verdict if again.status == "ok" else _worse(verdict, again, _AGAIN)

    @property
    def tolerance(self) -> float:
        """Largest error that the real problem's output may have."""
        return self._large.expected.output_tolerance

    def error(self) -> torch.Tensor:
        """Largest error of the real problem's output now, NaN if it holds one.

        On the device, and not waited for.
        """
        truth = self._large.expected
        part = self.inputs.output[:, :, truth.rows].double()
        return (part - truth.output).abs().max() + 0 * self.inputs.output.sum(dtype=torch.float32)

    def _restore(self) -> None:
        """Undo what a kernel did to the real problem's inputs."""
        fresh = make(self._case, SEEDS[0]).inputs
        for name in ("query", "key", "value"):
            getattr(self.inputs, name).copy_(getattr(fresh, name))


@dataclasses.dataclass(frozen=True, slots=True)
class _Check:
    """One call and its truth.

    Attributes:
        problem: what the call computes.
        guarded: the call.
        expected: its truth.
        name: for reasons; "" for the real problem.
        originals: copies of query, key and value, which no kernel may change; none where they
            are large.
    """

    problem: AttentionProblem
    guarded: Guarded
    expected: _Expected
    name: str
    originals: tuple[torch.Tensor, ...] = ()

    def verdict(self) -> Verdict:
        """Compare after a run."""
        inputs = self.guarded.inputs
        if self.guarded.overwritten():
            for memory in self.guarded.memories:  # the next candidate starts with whole guards
                memory[:GUARD_BYTES] = memory[-GUARD_BYTES:] = GUARD_BYTE
            return Verdict("oob", "it wrote outside of its output")
        present = (inputs.query, inputs.key, inputs.value)
        changed = [
            (mine, original)
            for mine, original in zip(present, self.originals, strict=bool(self.originals))
            if not torch.equal(mine, original)
        ]
        for mine, original in changed:
            mine.copy_(original)
        if changed:
            return Verdict("wrong_result", _CHANGED)
        return _compare(inputs, self.expected)


def _small_check(case: Case, seed: int, shortest: int | None) -> _Check:
    guarded = make(case, seed, shortest=shortest)
    inputs = guarded.inputs
    expected = _expect(inputs, [(0, case.problem.seqlen_q)])
    copies = tuple(tensor.clone() for tensor in (inputs.query, inputs.key, inputs.value))
    name = f"on a small ragged problem of seed {seed}: "
    return _Check(case.problem, guarded, expected, name, copies)


def _repeated(kernel: Kernel, small: _Check, config: Config, verdict: Verdict) -> Verdict:
    """The verdict with that of several runs of a small problem."""
    for index in range(_REPEATS):
        _run(kernel, small.guarded.inputs, config)
        name = small.name if not index else small.name + _AGAIN
        verdict = _worse(verdict, small.verdict(), name)
        if verdict.status != "ok":
            break
    return verdict


def _run(kernel: Kernel, inputs: AttentionInputs, config: Config) -> None:
    """Run into outputs full of NaN, and wait."""
    inputs.output.fill_(torch.nan)
    if inputs.lse is not None:
        inputs.lse.fill_(torch.nan)
    kernel.run(inputs, config)
    if inputs.query.is_cuda:
        torch.cuda.synchronize(inputs.query.device)


def _status_of(error: Exception) -> str:
    """The status for an exception, by its name: Triton and CuPy need not be imported for that."""
    name = type(error).__name__
    if "OutOfResources" in name or "OutOfMemory" in name or isinstance(error, MemoryError):
        return "resource"
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # torch on a CPU
        return "resource"
    if "Compil" in name or "PTXAS" in name.upper():
        return "compile_error"
    return "launch_error"


def _expect(inputs: AttentionInputs, blocks: list[tuple[int, int]]) -> _Expected:
    truth = [_reference(rows_of(inputs, *block), "float64") for block in blocks]
    eager = [_reference(rows_of(inputs, *block), "input") for block in blocks]
    output = torch.cat([one for one, _ in truth], dim=2)
    dtype = inputs.output.dtype
    # Kernels that compute float32 in parts round the values, and not their mean over many keys.
    largest = errors.largest(inputs.value) if dtype == torch.float32 else errors.largest(output)
    error = errors.error(torch.cat([one for one, _ in eager], dim=2), output)
    lse, lse_tolerance = None, 0.0
    if inputs.lse is not None:
        lse = torch.cat([one for _, one in truth if one is not None], dim=2)
        eager_lse = torch.cat([one for _, one in eager if one is not None], dim=2)
        lse_tolerance = errors.tolerance(
            errors.error(eager_lse, lse), errors.largest(lse), torch.float32
        )
    rows = torch.cat([torch.arange(*block) for block in blocks]).to(output.device)
    return _Expected(rows, output, lse, errors.tolerance(error, largest, dtype), lse_tolerance)


def _reference(part: AttentionInputs, dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and LSE of the reference computing in float64 or in the inputs' dtype."""
    reference = registry.kernel("reference")
    wide = torch.float64 if dtype == "float64" else part.output.dtype
    output = torch.empty(part.output.shape, dtype=wide, device=part.output.device)
    lse = None if part.lse is None else torch.empty(part.lse.shape, device=part.lse.device)
    exact = dataclasses.replace(part, output=output, lse=lse)
    reference.run(exact, reference.config_from_dict({"dtype": dtype}))
    return output, lse


def _compare(inputs: AttentionInputs, truth: _Expected) -> Verdict:
    if inputs.output.float().sum().isnan():
        rows = inputs.output.isnan().flatten(0, 1).any(-1).any(0).nonzero().flatten()
        where = (
            f"{rows.numel()} query rows, the first is row {int(rows[0])}" if len(rows) else "sums"
        )
        return Verdict("nan", f"NaN or not written: {where}")
    error = errors.error(inputs.output[:, :, truth.rows], truth.output)
    relative = error / max(errors.largest(truth.output), 1e-30)
    reason = ""
    if error > truth.output_tolerance:
        reason = f"output differs by {error:.3g}; {truth.output_tolerance:.3g} is allowed"
    elif truth.lse is not None and inputs.lse is not None:
        lse_error = errors.error(inputs.lse[:, :, truth.rows], truth.lse)
        if lse_error > truth.lse_tolerance:
            reason = f"lse differs by {lse_error:.3g}; {truth.lse_tolerance:.3g} is allowed"
    return Verdict("wrong_result" if reason else "ok", reason, error, relative)


def _worse(first: Verdict, second: Verdict, name: str) -> Verdict:
    """The second check's status with the larger errors of both."""
    return dataclasses.replace(
        second,
        reason=f"{name}{second.reason}" if second.reason else "",
        max_abs_err=max(first.max_abs_err or 0.0, second.max_abs_err or 0.0),
        max_rel_err=max(first.max_rel_err or 0.0, second.max_rel_err or 0.0),
    )
