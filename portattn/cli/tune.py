"""``portattn tune``: the tuner with a progress bar and a summary."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portattn.cli import tune_tables, tune_worker
from portattn.cli.tune_sources import Wanted, mirror_for
from portattn.report.text import duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from portattn.tuner import Case, TuningReport

PARTIAL = 3


def tune(
    problem: Annotated[
        list[str] | None,
        typer.Option(
            help='What to tune, e.g. "b1 h8 kv8 s4096 d64 float32 causal"; may be repeated.'
        ),
    ] = None,
    problems: Annotated[
        Path | None, typer.Option(help="A file of such texts: one a line, or a JSON list.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="The attention of a model, e.g. llama-3-8b, or of a config.json of transformers; "
            "may be repeated."
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(help="forward, sparse, documents or decode; may be repeated."),
    ] = None,
    missed: Annotated[
        bool, typer.Option("--missed", help="What calls asked for and nobody has tuned here.")
    ] = False,
    min_count: Annotated[
        int, typer.Option(min=1, help="With --missed: leave out what was asked for less often.")
    ] = 1,
    stale: Annotated[
        bool,
        typer.Option("--stale", help="What was tuned with another toolchain or kernel source."),
    ] = False,
    budget: Annotated[
        float, typer.Option(min=0.001, help="Seconds, for all devices and problems.")
    ] = 60.0,
    device: Annotated[
        list[str] | None,
        typer.Option(help="A torch device; may be repeated. Default: every one present."),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="A kernel's name; may be repeated. Default: all but the reference."),
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="File or SQLAlchemy URL instead of PORTATTN_DB.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    most: Annotated[
        int | None,
        typer.Option(min=1, help="Configs to try of a kernel on a problem. Default: what fits."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="How to time: eager_cold, eager_warm, and on GPUs graph_cold, graph_warm."
        ),
    ] = None,
    confirm: Annotated[
        bool, typer.Option(help="Store a winner only if it wins in a fresh process too.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count configs and estimate the time; run nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on with the same run if it was stopped before its end.")
    ] = True,
    enqueue: Annotated[
        bool, typer.Option("--enqueue", help="Queue the problems for workers; tune nothing.")
    ] = False,
    family: Annotated[
        str | None, typer.Option(help="With --enqueue: devices to queue for, e.g. cuda-sm_90.")
    ] = None,
    worker: Annotated[
        bool, typer.Option("--worker", help="Tune what is queued, until nothing is.")
    ] = False,
    stay: Annotated[
        bool, typer.Option("--stay", help="With --worker: wait for more instead of ending.")
    ] = False,
    optuna_storage: Annotated[
        str | None,
        typer.Option(help="Copy the trials to this SQLAlchemy URL, for optuna-dashboard."),
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Find the fastest config of every kernel on this machine and remember it.

    Every candidate is checked against the float64 reference before it is timed, and the default
    config stays unless another is faster beyond noise. A run that was stopped goes on where it
    was. Several machines share work through one database: --enqueue there, --worker on each; the
    budget is then for each job. Exits with 3 if the budget ended before the last problem, or if a
    job failed.
    """
    from rich.console import Console

    from portattn.tuning_db.store import Store

    console = Console()
    devices = device or _devices()
    tune_worker.check(enqueue=enqueue, worker=worker, family=family, stay=stay)
    wanted = Wanted(
        problems=tuple(problem or ()),
        file=problems,
        presets=tuple(preset or ()),
        models=tuple(model or ()),
        missed=missed,
        stale=stale,
        min_count=min_count,
        database=database,
        family=family,
    )
    given = {"budget_seconds": budget, "seed": seed, "most": most, "policy": policy}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if enqueue:
        tune_worker.enqueue(Store(database), family, devices, wanted.cases, kernel, options)
        return
    options["confirm"] = confirm
    if worker:
        tune_worker.run(console, Store(database), devices, stay=stay, options=options)
        return
    chosen = {name: found for name in devices if (found := wanted.cases(name))}
    if not chosen:
        console.print("nothing to tune: no such problem is in the database")
    if dry_run:
        for name, cases in chosen.items():
            _estimate(console, cases, name, kernel, most)
        return
    store = Store(database)
    mirror = mirror_for(optuna_storage, store)
    is_partial = False
    for index, (name, cases) in enumerate(chosen.items()):
        options |= {
            "budget_seconds": budget / len(chosen),
            "device": name,
            "kernels": kernel,
            "store": store,
            "resume": resume,
            "policy": policy,
            "confirm": confirm,
        }
        report = _run(console, cases, options, mirror, progress=progress)
        tune_tables.summary(console, report)
        wanted.forget(store, name, cases, report.left_out)
        is_partial = is_partial or bool(report.left_out)
        if index + 1 < len(chosen):
            console.print()
    if is_partial:
        raise typer.Exit(PARTIAL)


def _devices() -> list[str]:
    """One GPU of each kind that torch sees, then the CPU: equal devices share their results."""
    import torch

    from portattn.device import device_key

    kinds: dict[str, str] = {}
    for index in range(torch.cuda.device_count()):
        kinds.setdefault(device_key(f"cuda:{index}").fingerprint, f"cuda:{index}")
    return [*kinds.values(), "cpu"]


def _estimate(
    console: Console, cases: list[Case], device: str, kernels: list[str] | None, most: int | None
) -> None:
    """Print what tuning a device would do."""
    from portattn.device import device_key
    from portattn.tuner.estimate import estimate

    key = device_key(device)
    tune_tables.estimate(console, key.name, estimate(cases, key, kernels, most))


def _run(
    console: Console,
    cases: list[Case],
    options: dict[str, Any],
    mirror: Callable[[], int],
    *,
    progress: bool,
) -> TuningReport:
    """Tune one device, with a progress bar; trials are mirrored when a problem is done."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from portattn import tuner

    seconds: float = options["budget_seconds"]
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not progress) as bar:
        task = bar.add_task("starting", total=seconds)

        def tell(now: tuner.Progress) -> None:
            text = f"{now.problem + 1}/{now.problems} {now.label}: {now.stage} {now.kernel}"
            if now.feasible:
                text += f" {now.tried}/{now.feasible}"
            if now.best_ns is not None and now.default_ns is not None:
                best, default = map(duration, (now.best_ns, now.default_ns))
                text += f", best {best}, default {default}"
            bar.update(task, completed=min(now.elapsed_s, seconds), description=text)
            if now.stage == "stored":
                mirror()

        try:
            return tuner.tune(cases, progress=tell, **options)
        finally:
            mirror()
