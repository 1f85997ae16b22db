"""``portattn tune --enqueue`` and ``--worker``: work shared by a fleet, through one database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from portattn.cli import tune_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from portattn.tuner import Case
    from portattn.tuner.jobs import Finished
    from portattn.tuning_db.store import Store

FAILED = 3


def check(*, enqueue: bool, worker: bool, family: str | None, stay: bool) -> None:
    """Refuse options that say nothing together."""
    if enqueue and worker:
        raise typer.BadParameter("--enqueue and --worker exclude each other: queue first")
    if family is not None and not enqueue:
        raise typer.BadParameter("--family belongs to --enqueue; workers know their devices")
    if stay and not worker:
        raise typer.BadParameter("--stay belongs to --worker")


def enqueue(
    store: Store,
    family: str | None,
    devices: Sequence[str],
    cases_on: Callable[[str], list[Case]],
    kernels: Sequence[str] | None,
    options: dict[str, Any],
) -> None:
    """Queue problems for a family of devices, or for each kind that this machine has.

    Args:
        store: the shared database.
        family: such as ``"cuda-sm_90"``; need not be here.
        devices: torch devices of this machine.
        cases_on: the problems on a torch device.
        kernels: names; None for all.
        options: of each job.
    """
    from portattn.device import device_key
    from portattn.errors import TuningError
    from portattn.tuner.jobs import submit

    if family is None:
        wanted = {device_key(device).family: device for device in devices}
    else:
        kind, _, arch = family.partition("-")
        if kind not in ("cpu", "cuda", "hip") or not arch:
            raise TuningError(
                f"--family is {family!r}; it is a kind and an architecture, e.g. cuda-sm_90 or "
                "cpu-x86_64-v4: `portattn doctor` shows those of a machine"
            )
        wanted = {family: "cpu" if kind == "cpu" else "cuda"}
    for name, device in wanted.items():
        problems = cases_on(device)
        new = submit(store, problems, name, kernels=kernels, options=options)
        waiting = len(problems) * len(kernels or ("",)) - new
        also = f", {waiting} wait already" if waiting else ""
        typer.echo(f"{name}: {new} jobs queued in {store.location.shown}{also}")


def run(
    console: Console,
    store: Store,
    devices: Sequence[str],
    *,
    stay: bool,
    options: dict[str, Any],
) -> None:
    """Tune jobs until none is left, or until interrupted. Exits with 3 if one failed."""
    from portattn.tuner import jobs

    def told(one: Finished) -> None:
        where = f"job {one.lease.job_id} {one.label}"
        if one.report is not None:
            console.print(where)
            tune_tables.summary(console, one.report)
        else:
            console.print(f"{where}: {one.state}: {one.error}", markup=False)

    try:
        finished = jobs.work(store, devices, stay=stay, told=told, options=options)
    except KeyboardInterrupt:
        console.print("interrupted; the job goes on at the next worker")
        raise typer.Exit(130) from None
    done = sum(one.state == "done" for one in finished)
    console.print(f"{done} of {len(finished)} jobs done; none waits for this machine")
    if done < len(finished):
        raise typer.Exit(FAILED)
