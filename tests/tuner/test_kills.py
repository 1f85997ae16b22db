"""kill -9 of the tuner, of a compiler and of the measuring process, on either database.

``benchmarks/tuner_safety.py`` does the same hundreds of times.
"""

import pytest

from portattn.tuning_db import lookup
from tests.tuner.killing import Hunt


@pytest.mark.parametrize(("kind", "kills"), [("sqlite", 12), ("postgresql", 8)])
def test_nothing_acknowledged_is_lost_and_nothing_is_measured_twice(
    kind, kills, tmp_path, request
):
    url = str(tmp_path / "tuning.db")
    if kind == "postgresql":
        url = request.getfixturevalue("postgresql").database()
    hunt = Hunt(url, seed=kills, most_seconds=0.4)
    outcome = hunt.run(kills)
    lookup.reload()
    assert outcome.problems == []
    assert sum(outcome.kills.values()) == kills
    assert outcome.kills["tuner"] > 1
    assert outcome.finished >= 1
    assert outcome.acknowledged >= 60  # a life that ends between a commit and its word says less
