"""kill -9 of a tuner and of its processes at random instants, and what must hold after each.

`Hunt` runs tuners one life after the other (`tests.tuner.hunted`), each a process of its own with
real pipes, compilers and a measuring process, and kills the tuner, a compiler or the measuring
process.
"""

import collections
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import sqlalchemy

from tests.tuner.hunted import CASES


def _children(pid: int) -> list[int]:
    """Processes that a process started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@dataclasses.dataclass
class Outcome:
    """What a hunt saw.

    Attributes:
        kills: victim -> how many.
        finished: runs that came to their end.
        acknowledged: measurements that the store acknowledged.
        problems: whatever must not be; empty if all is well.
    """

    kills: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    finished: int = 0
    acknowledged: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)


class Hunt:
    """Tuners of one database, killed again and again.

    Args:
        url: of the database.
        seed: of the instants and victims.
        most_seconds: a kill comes so long after a life began, or after the kill before, at most.
    """

    def __init__(self, url: str, seed: int = 0, most_seconds: float = 0.5) -> None:
        from portattn.tuning_db.store import Store

        self._url, self._random, self._most = url, random.Random(seed), most_seconds
        self._store = Store(url)
        self._seed = 0
        self.outcome = Outcome()
        self._acknowledged: set[tuple[str, str]] = set()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.tuner.hunted"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PORTATTN_DB": "none"},
            cwd=Path(__file__).parents[2],
        )
        self._buffer = b""
        self._ahead: list[dict] = []  # said, and not listened to yet
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def run(self, kills: int) -> Outcome:
        """Kill so often, then let the last run end."""
        with self._process:  # its pipes are closed and it is waited for
            self._wait("ready", 120)
            while sum(self.outcome.kills.values()) < kills:
                self._life(kills)
            self._life(0)
        self._check_database()
        return self.outcome

    def _life(self, kills: int) -> None:
        before = self._stored()
        order = {"url": self._url, "seed": self._seed}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        pid = self._wait("born", 60)["pid"]
        events, is_over = [], False
        if self._random.random() < 0.8:  # most lives get past their start, however slow it is
            while not is_over and not any(one["event"] == "try" for one in events):
                new, is_over = self._listen(0.01)
                events += new
        while not is_over:
            is_hunted = sum(self.outcome.kills.values()) < kills
            wait = self._random.uniform(0, self._most) if is_hunted else 60
            new, is_over = self._listen(wait)
            events += new
            if not is_over and is_hunted:
                self._kill(pid)
        if events[-1]["status"] == 0:
            self.outcome.finished += 1
            self._seed += 1  # the next life does other work
        self._judge(events, before)

    def _kill(self, tuner: int) -> None:
        """Kill the tuner itself in half of the cases, else one of its processes."""
        victims = _children(tuner)
        if not victims or self._random.random() < 0.5:
            name, pid = "tuner", tuner
        else:
            pid = self._random.choice(victims)
            try:
                role = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-2].decode()
            except (OSError, IndexError):
                return  # it ended by itself
            name = {"measure": "measuring process", "compile": "compiler"}.get(role, "starting")
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.outcome.kills[name] += 1

    def _listen(self, seconds: float) -> tuple[list[dict], bool]:
        """What is said in some seconds, or until the life is over."""
        events, deadline = self._ahead, time.monotonic() + seconds
        self._ahead = []
        while True:
            chunk = self._process.stdout.read() or b""
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            events += [json.loads(line) for line in lines]
            if events and events[-1]["event"] == "died":
                return events, True
            if time.monotonic() >= deadline:
                return events, False
            time.sleep(0.002)

    def _wait(self, event: str, seconds: float) -> dict:
        """The first such event; what is said after it is kept."""
        deadline = time.monotonic() + seconds
        events: list[dict] = []
        while True:
            for index, one in enumerate(events):
                if one["event"] == event:
                    self._ahead = events[index + 1 :]
                    return one
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"no {event!r} within {seconds} s, but {events[-3:]}")
            events += self._listen(0)[0]

    def _stored(self) -> dict[tuple[str, str], int]:
        """(run, config and shape) of each measurement of a search -> how often it is stored."""
        query = sqlalchemy.text(
            "SELECT m.run_id, c.params_json, m.shape_json FROM measurement m "
            "JOIN config c ON c.id = m.config_id WHERE m.round = 0"
        )
        with self._store.transaction() as connection:
            rows = connection.execute(query).all()
        return collections.Counter(
            (run, _what(json.loads(config), json.loads(shape))) for run, config, shape in rows
        )

    def _judge(self, events: list[dict], before: dict[tuple[str, str], int]) -> None:
        """Whatever a life must not have done."""
        run, tried = "", collections.Counter()
        for one in events:
            if one["event"] == "run":
                run = one["run"]
            elif one["event"] == "error":
                self.outcome.problems.append(f"the tuner failed: {one['text']}")
            elif one["event"] in ("try", "stored"):
                key = (run, _what(one["config"], one["case"]))
                if one["event"] == "stored":
                    self._acknowledged.add(key)
                    continue
                tried[key] += 1
                if key in before or tried[key] > 1 or key in self._acknowledged:
                    self.outcome.problems.append(f"measured twice: {key}")
        stored = self._stored()
        self.outcome.acknowledged = len(self._acknowledged)
        self.outcome.problems += [
            f"acknowledged and lost: {key}" for key in self._acknowledged - set(stored)
        ]
        self.outcome.problems += [
            f"stored {count} times: {key}" for key, count in stored.items() if count > 1
        ]

    def _check_database(self) -> None:
        """Whole, and every run that ended has its best rows."""
        from portattn.tuning_db import schema

        with self._store.transaction() as connection:
            if connection.dialect.name == "sqlite":
                found = connection.exec_driver_sql("PRAGMA integrity_check").scalar_one()
                broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
                if found != "ok" or broken:
                    self.outcome.problems.append(f"database: {found} {broken}")
            states = connection.execute(sqlalchemy.select(schema.run.c.state)).scalars().all()
            finals = sqlalchemy.select(sqlalchemy.func.count()).where(
                schema.measurement.c.round == 1
            )
            count = connection.execute(finals).scalar_one()
            status = set(
                connection.execute(sqlalchemy.select(schema.measurement.c.status)).scalars()
            )
        # A tuner that is killed between its last commit and its exit leaves a run that is done.
        finished = self.outcome.finished
        most = finished + self.outcome.kills["tuner"]
        if set(states) != {"done"} or not finished <= len(states) <= most:
            counts = dict(collections.Counter(states))
            self.outcome.problems.append(f"{finished} tuners ended, runs stored: {counts}")
        if count < 2 * len(CASES) * len(states):
            self.outcome.problems.append(f"finals are missing: {count}")
        if status != {"ok"}:
            self.outcome.problems.append(f"a kill was taken for a config's fault: {status}")


def _what(config: dict, shape: dict) -> str:
    return json.dumps([config, shape], sort_keys=True)
