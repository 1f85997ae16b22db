"""What holds for every test: no network, no window, a tuning database of its own, fixed seeds."""

import os
import random
import sys
from pathlib import Path

import hypothesis
import pytest

# Before portattn is imported anywhere, so that no test reads or writes the user's own database.
os.environ["PORTATTN_DB"] = "none"
os.environ["PORTATTN_MISSES"] = "off"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

# The same examples in every run, and no deadline: a busy machine is not a failure.
hypothesis.settings.register_profile("portattn", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("portattn")


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Same random numbers in every run; torch only where the test has loaded it."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def postgresql():
    """A PostgreSQL server; `database()` of it is the URL of a new database."""
    from tests.postgresql import Cluster

    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
