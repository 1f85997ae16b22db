"""Merging exports is commutative, associative and idempotent, also where they disagree."""

import dataclasses
import shutil

import hypothesis
import pytest
from hypothesis import strategies

from portattn.tuning_db.exchange import export_text, import_text
from portattn.tuning_db.store import Store
from tests.tuning_db.conftest import DEVICE, PROBLEM, result

RUNS = tuple(f"{number:08d}-0000-0000-0000-000000000000" for number in range(2))

# What one database knows: few values, so that several of them speak of the same thing.
facts = strategies.tuples(
    strategies.sampled_from(("a processor", "another name of it")),
    strategies.sampled_from((512, 1024)),  # the problem
    strategies.sampled_from((32, 64)),  # the config
    strategies.sampled_from((700, 800)),  # its time
    strategies.sampled_from((1000, 2000)),  # the default's
    strategies.sampled_from(("a" * 64, "c" * 64)),  # the kernel's source
    strategies.sampled_from(RUNS),
    strategies.sampled_from((5, 6)),  # the run's last sign of life
    strategies.sampled_from(("done", "partial")),
)
databases = strategies.lists(facts, min_size=0, max_size=3)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A function that opens a new empty database."""
    folder = tmp_path_factory.mktemp("merge")
    empty = folder / "empty.db"
    Store(empty)
    numbers = iter(range(10**9))

    def make_store():
        path = folder / f"{next(numbers)}.db"
        shutil.copy(empty, path)
        return Store(path)

    return make_store


def text_of(store, found):
    """An export that holds these facts."""
    for name, seqlen, block, median, default, source, run_id, heartbeat, state in found:
        one = result(
            {"block_q": block, "pack": True},
            median,
            device=dataclasses.replace(DEVICE, name=name),
            problem=dataclasses.replace(PROBLEM, seqlen_q=seqlen),
            default_ns=default,
            source=source,
        )
        begun = store.begin_run(effort="test", seed=0, budget={})
        store.record(begun, one)
        with store.transaction() as connection:  # runs as two copies of one database tell them
            taken = f"SELECT count(*) FROM run WHERE id = '{run_id}'"
            if connection.exec_driver_sql(taken).scalar_one():
                continue
            connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
            change = f"UPDATE run SET id = '{run_id}', state = '{state}', started_us = 1, pid = 1,"
            change += f" heartbeat_us = {heartbeat}, host = 'h' WHERE id = '{begun}'"
            connection.exec_driver_sql(change)
            change = f"UPDATE measurement SET run_id = '{run_id}', created_us = 7"
            connection.exec_driver_sql(f"{change} WHERE run_id = '{begun}'")
    return export_text(store)


def merge(make, *texts):
    store = make()
    for text in texts:
        import_text(store, text)
    return export_text(store)


@hypothesis.settings(max_examples=12)
@hypothesis.given(databases, databases, databases)
def test_merging_is_commutative_associative_and_idempotent(make, first, second, third):
    a, b, c = (text_of(make(), found) for found in (first, second, third))
    assert merge(make, a, a) == a
    left = merge(make, merge(make, a, b), c)
    assert left == merge(make, a, merge(make, c, b))
    assert left == merge(make, b, c, a, left)


def test_what_merging_keeps(make):
    one = ("x", 512, 32, 800, 1000, "a" * 64, RUNS[0], 5, "partial")
    a = text_of(make(), [one])
    b = text_of(make(), [(*one[:2], 64, 700, *one[4:7], 6, "done")])
    merged = merge(make, a, b)
    assert '"median_ns": 700' in merged
    assert '"state": "done"' in merged  # the later news of the run
    assert '"state": "partial"' not in merged
