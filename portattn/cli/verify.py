"""``portattn verify``: the conformance suite as a table."""

from __future__ import annotations

import fnmatch
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from portattn.conformance import (
    CASES,
    DTYPES,
    Case,
    Outcome,
    gradient_outcome,
    kernels,
    outcome,
)
from portattn.errors import ConfigError

_STYLES = {"pass": "green", "fail": "bold red", "refused": "yellow"}


def verify(
    backend: Annotated[
        list[str] | None,
        typer.Option(help="A backend or one kernel; may be repeated. Default: every kernel."),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="A case's name or pattern, e.g. 'kv_lengths*'; may be repeated."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, float16 or bfloat16; may be repeated. Default: all."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="A torch device. Default: cuda if there is one, else cpu.")
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Compare gradients instead of outputs.")
    ] = False,
) -> None:
    """Compare every kernel with the float64 reference, case by case.

    A cell shows the largest error of the output, and in brackets that of the plain eager
    computation in the same dtype. The rule: error <= 2 * eager error + 2 * eps * largest value,
    for output and LSE; with --gradients for those by every input (a cell then shows the one
    nearest to what is allowed). Exits with 1 if a case fails.
    """
    console = Console()
    names = _kernels(backend)
    cases = [one for one in _cases(case) if not (gradients and one.poison)]
    run = gradient_outcome if gradients else outcome
    dtypes = _dtypes(dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    failures: list[Outcome] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("verify", total=len(names) * len(cases) * len(dtypes))
        results: dict[tuple[str, str, str], Outcome] = {}
        # Kernels innermost: the reference of a case is computed once for all of them.
        for one in cases:
            for name in dtypes:
                for kernel in names:
                    results[kernel, one.name, name] = run(kernel, one, name, device)
                    progress.advance(task)
    for kernel in names:
        own = {key: result for key, result in results.items() if key[0] == kernel}
        _print(console, kernel, device, cases, dtypes, own)
        failures += [result for result in own.values() if result.status == "fail"]
    _summary(console, results, failures)
    if failures:
        raise typer.Exit(1)


def _kernels(backends: list[str] | None) -> list[str]:
    try:
        return kernels(backends)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--backend") from error


def _cases(patterns: list[str] | None) -> list[Case]:
    if not patterns:
        return list(CASES.values())
    chosen = []
    for pattern in patterns:
        found = [case for name, case in CASES.items() if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise typer.BadParameter(
                f"{pattern!r} matches none of {', '.join(CASES)}", param_hint="--case"
            )
        chosen += found
    return list(dict.fromkeys(chosen))


def _dtypes(names: list[str] | None) -> list[str]:
    for name in names or ():
        if name not in DTYPES:
            raise typer.BadParameter(
                f"{name!r} is none of {', '.join(DTYPES)}", param_hint="--dtype"
            )
    return list(dict.fromkeys(names or DTYPES))


def _print(
    console: Console,
    kernel: str,
    device: str,
    cases: list[Case],
    dtypes: list[str],
    results: dict[tuple[str, str, str], Outcome],
) -> None:
    """One kernel's table; a reason for refusing stands under it once, with a number."""
    title = f"{kernel} on {device}"
    reasons = list(
        dict.fromkeys(one.detail for one in results.values() if one.status == "refused")
    )
    if len(reasons) == 1 and all(one.status == "refused" for one in results.values()):
        console.print(Text(f"{title}: refused, every case: {reasons[0]}", _STYLES["refused"]))
        return
    table = Table(title=title, title_justify="left")
    table.add_column("case", no_wrap=True)
    for dtype in dtypes:
        table.add_column(f"{dtype}\nerror (eager)", no_wrap=True)
    for case in cases:
        cells = [_cell(results[kernel, case.name, dtype], reasons) for dtype in dtypes]
        table.add_row(case.name, *cells)
    console.print(table)
    for number, reason in enumerate(reasons, start=1):
        console.print(Text(f"refused: [{number}] {reason}", _STYLES["refused"]))


def _cell(result: Outcome, reasons: list[str]) -> Text:
    style = _STYLES[result.status]
    if result.status == "refused":
        return Text(f"refused [{reasons.index(result.detail) + 1}]", style)
    shown = result.output
    if result.gradients:
        shown = max((one for _, one in result.gradients), key=lambda one: one.share)
    if shown is None:
        return Text("FAIL", style)
    if CASES[result.case].poison:
        return Text("NaN arrives" if result.status == "pass" else "FAIL", style)
    mark = "FAIL " if result.status == "fail" else ""
    return Text(f"{mark}{shown.error:.1e} ({shown.eager_error:.1e})", style)


def _summary(
    console: Console, results: dict[tuple[str, str, str], Outcome], failures: list[Outcome]
) -> None:
    counts = {
        status: sum(result.status == status for result in results.values()) for status in _STYLES
    }
    for result in failures:
        console.print(
            Text(f"FAIL {result.kernel} {result.case} {result.dtype}: {result.detail}", "bold red")
        )
    console.print(
        f"{counts['pass']} passed, {counts['fail']} failed, {counts['refused']} refused with a "
        "reason"
    )
