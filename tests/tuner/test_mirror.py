"""Trials copied to an Optuna storage."""

import optuna
import pytest

from portattn.errors import TuningError
from portattn.tuner import cases
from portattn.tuner.mirror import Mirror
from portattn.tuning_db.store import Store
from tests import stored


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "tuning.db")


def test_every_trial_of_this_process_is_there_once(store, tmp_path):
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    run_id = store.begin_run(effort="test", seed=0, budget={})
    stored.store_search(store, run_id, cases.parse("h2 s64 d32"))  # before: not copied
    mirror = Mirror(url, store)
    assert mirror.update() == 0
    stored.store_search(store, run_id, cases.parse("h2 s64 d16"))
    assert Mirror(url, store).update() == 0
    assert mirror.update() == 13
    assert mirror.update() == 0
    (name,) = optuna.get_all_study_names(url)
    assert "h2 s64 d16" in name
    study = optuna.load_study(study_name=name, storage=url)
    states = [trial.state.name for trial in study.trials]
    assert (states.count("COMPLETE"), states.count("FAIL")) == (11, 2)
    assert study.best_value == 2.0  # ms
    assert study.best_params["block_q"] == 112
    assert study.best_params["pack"] is False
    failed = next(trial for trial in study.trials if trial.state.name == "FAIL")
    assert failed.user_attrs["status"] == "wrong_result"
    assert failed.user_attrs["error"].startswith("off by 3")


def test_texts_of_a_kernels_space_are_categories(store, tmp_path):
    mirror = Mirror(f"sqlite:///{tmp_path / 'trials.db'}", store)
    row = {
        "kernel_name": "cpu_forward", "device_kind": "cpu", "mask_kind": "dense",
        "shape_json": '{"batch":1,"dtype":"float32","features":"","head_dim":16,"head_dim_v":16,'
        '"num_heads":2,"num_kv_heads":2,"q_offset":0,"seqlen_k":64,"seqlen_q":64}',
    }  # fmt: skip
    assert "none" in mirror._choices(row)["pack"]
    assert mirror._choices({**row, "shape_json": "{}"}) == {}
    assert mirror._choices({**row, "kernel_name": "of another version"}) == {}


def test_a_storage_that_cannot_be_used_is_refused(store, tmp_path):
    with pytest.raises(TuningError, match="is the tuning database"):
        Mirror(str(store.location.url), store)
    for url in ("nonsense://x", "sqlite:////no/such/folder/x.db", str(tmp_path / "file.db")):
        with pytest.raises(TuningError, match="cannot be opened"):
            Mirror(url, store)
