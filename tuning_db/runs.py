"""Tuning runs: begun, continued after their process died, and fenced.

A run that is continued keeps its id, so that the database itself refuses to hold one of its
measurements twice. Whoever continues it counts its fence up; what the process before still writes,
having slept or lost its lease, is refused.
"""

from __future__ import annotations

import os
import socket
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy

from portattn.errors import TuningError
from portattn.tuning_db import schema
from portattn.tuning_db.identity import canonical_json, sha256
from portattn.tuning_db.rows import now_us

if TYPE_CHECKING:
    from collections.abc import Mapping

# A process of another machine that wrote nothing for so long is dead. Its measurements, which are
# its heartbeats, take seconds.
DEAD_US = 300 * 1_000_000


class LostRunError(TuningError):
    """Another process continues this run: it took too long, or slept."""

    def __init__(self, run_id: str) -> None:
        super().__init__(
            f"tuning run {run_id} was taken over by another process, so that nothing more is "
            "stored of it here; what was stored before stays. Start `portattn tune` again if "
            "there is work left"
        )


def _pid_started(pid: int) -> str:
    """When a process of this machine began, in the kernel's ticks; "" if it does not run."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def _me() -> dict[str, Any]:
    """Columns that name this process."""
    host = f"{socket.gethostname()[:200]}/{_pid_started(os.getpid())}"
    return {"host": host, "pid": os.getpid()}


def is_alive(host: str, pid: int, heartbeat_us: int) -> bool:
    """Whether the process that works on a run still may."""
    name, _, started = host.rpartition("/")
    if name == socket.gethostname()[:200] and started:
        return _pid_started(pid) == started
    return now_us() - heartbeat_us < DEAD_US


def begin(
    connection: sqlalchemy.Connection, values: Mapping[str, Any], *, resume: bool
) -> tuple[str, int]:
    """Continue the newest unfinished run with the same work, or begin one.

    Args:
        connection: inside a transaction.
        values: effort, seed, budget_json and work_sha256.
        resume: False always begins one.

    Returns:
        Its id and fence.
    """
    run = schema.run
    mine = {**_me(), "heartbeat_us": now_us(), "state": "running"}
    if resume and values["work_sha256"]:
        query = (
            sqlalchemy.select(run)
            .where(run.c.work_sha256 == values["work_sha256"], run.c.state != "done")
            .order_by(run.c.started_us.desc(), run.c.id)
        )
        for row in connection.execute(query).mappings().fetchmany(8):
            is_busy = row["state"] == "running" and is_alive(
                row["host"], row["pid"], row["heartbeat_us"]
            )
            if is_busy:
                continue
            change = run.update().where(run.c.id == row["id"], run.c.fence == row["fence"])
            if connection.execute(change.values(**mine, fence=row["fence"] + 1)).rowcount:
                return row["id"], row["fence"] + 1
    run_id = str(uuid.uuid4())
    connection.execute(
        run.insert().values(
            id=run_id,
            started_us=mine["heartbeat_us"],
            git_sha="",
            argv_sha256=sha256(sys.argv),
            fence=1,
            **mine,
            **values,
        )
    )
    return run_id, 1


def check(connection: sqlalchemy.Connection, run_id: str, fence: int, **values: str) -> None:
    """Note a sign of life, and hold the run until the transaction's end.

    Args:
        connection: inside a transaction, before it writes anything.
        run_id, fence: of `begin`.
        values: columns to change as well.

    Raises:
        LostRunError: the fence is another's.
    """
    run = schema.run
    change = run.update().where(run.c.id == run_id, run.c.fence == fence)
    if not connection.execute(change.values(heartbeat_us=now_us(), **values)).rowcount:
        raise LostRunError(run_id)


def take_away(connection: sqlalchemy.Connection, run_id: str) -> None:
    """Refuse whatever the process that works on a run still writes, and let it be continued."""
    run = schema.run
    change = run.update().where(run.c.id == run_id)
    connection.execute(change.values(fence=run.c.fence + 1, state="failed"))


def new_values(effort: str, seed: int, budget: Mapping[str, Any], work: object) -> dict[str, Any]:
    """What `begin` stores of a run; work is a JSON value, None for a run nobody may continue."""
    return {
        "effort": effort,
        "seed": seed,
        "budget_json": canonical_json(dict(budget)),
        "work_sha256": "" if work is None else sha256(work),
    }
