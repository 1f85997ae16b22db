"""500 spoiled databases, exports, jobs and seeds; ``benchmarks/tuner_fuzz.py`` does 10,000."""

import collections
import os

import pytest

from portattn import call
from portattn.tuning_db import lookup, snapshot
from tests.tuning_db.fuzzing import KINDS, Fuzzer

COUNT = 500


@pytest.fixture
def fuzzer(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "READ_SECONDS", 0.3)
    yield Fuzzer(tmp_path, lambda text: monkeypatch.setenv("PORTATTN_DB", text))
    monkeypatch.undo()
    assert os.environ["PORTATTN_DB"] == "none"
    lookup.reload()
    call.clear_cache()


def test_a_spoiled_database_costs_one_warning_and_nothing_else(fuzzer):
    findings = [fuzzer.check(number) for number in range(COUNT)]
    outcomes = collections.Counter((one.kind, one.used) for one in findings)
    # The fuzzing bites, and not everywhere.
    for kind in ("noise", "pages", "rows", "schema"):
        assert outcomes[kind, False] > 0
        assert outcomes[kind, True] > 0
    assert {kind for kind, _ in outcomes} == set(KINDS)
    assert any(one.messages for one in findings)
