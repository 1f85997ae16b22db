"""The tuner on a kernel whose times and faults are known."""

import dataclasses
import json

import pytest
import sqlalchemy

from portattn.device import device_key
from portattn.errors import TuningError
from portattn.tuner import Case, cases, tune
from portattn.tuning_db import lookup, schema

OPTIMUM = {"block_q": 128, "block_k": 32, "unroll": True, "fault": "none"}
DEFAULT = {"block_q": 64, "block_k": 64, "unroll": False, "fault": "none"}


def run(kernel, case, store, fake_timer, **options):
    options = {"budget_seconds": 30, "kernels": [kernel], "timer": fake_timer(kernel), **options}
    return tune([case], store=store, **options)


def rows(store, table):
    with store.transaction() as connection:
        return [dict(row) for row in connection.execute(sqlalchemy.select(table)).mappings()]


def test_the_optimum_is_found_stored_and_looked_up(fake_kernel, fake_timer, case, store):
    report = run(fake_kernel(), case, store, fake_timer)
    kernel = report.problems[0].kernels[0]
    assert kernel.params == OPTIMUM
    assert (kernel.default_ns, kernel.best_ns) == (11_280_000, 9_000_000)
    assert kernel.gain == pytest.approx(1.2533, abs=1e-4)
    assert kernel.tried == kernel.feasible == 30
    assert kernel.declared == 32
    assert kernel.infeasible == {"tile has more than 8192 elements": 2}
    found = lookup.find("fake_forward", case.problem, device_key("cpu"))
    assert found == (OPTIMUM, "exact")
    assert rows(store, schema.run)[0]["state"] == "done"


def test_the_default_is_tried_first_and_always(fake_kernel, fake_config, fake_timer, case, store):
    kernel = fake_kernel()
    report = run(kernel, case, store, fake_timer, budget_seconds=1e-6)
    assert report.problems[0].kernels[0].tried == 1
    assert next(iter(kernel.runs)) == fake_config()
    assert report.problems[0].kernels[0].params == DEFAULT
    # No fields: the kernel is asked for its default for the exact shape.
    assert lookup.find("fake_forward", case.problem, device_key("cpu")) == ({}, "exact")


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("wrong", "wrong_result"),
        ("unwritten", "nan"),
        ("raises", "launch_error"),
        ("out_of_memory", "resource"),
        ("wrong_when_ragged", "wrong_result"),
        ("wrong_at_edges", "wrong_result"),
        ("oob", "oob"),
        ("changes_inputs", "wrong_result"),
    ],
)
def test_a_faulty_config_is_rejected_recorded_and_never_timed(
    fault, status, fake_kernel, fake_timer, case, store
):
    kernel = fake_kernel(faults=("none", fault))
    report = run(kernel, case, store, fake_timer).problems[0].kernels[0]
    assert report.params == OPTIMUM
    assert {(params["fault"], one) for params, one, _ in report.rejected} == {(fault, status)}
    faulty = {config: count for config, count in kernel.runs.items() if config.fault == fault}
    assert len(faulty) == 30
    # The real problem once, a small one three times, the other once at most: no timing.
    assert max(faulty.values()) <= 5
    stored = [row for row in rows(store, schema.measurement) if row["status"] != "ok"]
    assert len(stored) == 30
    assert all(row["median_ns"] is None and row["error_text"] for row in stored)


def test_a_wrong_default_ends_the_kernel(fake_kernel, fake_config, fake_timer, case, store):
    kernel = fake_kernel(faults=("wrong",))
    kernel.default_config = lambda problem: fake_config(fault="wrong")
    report = run(kernel, case, store, fake_timer).problems[0]
    assert report.kernels[0].params is None
    assert report.fastest is None
    assert rows(store, schema.best) == []
    assert lookup.find("fake_forward", case.problem, device_key("cpu")) is None


def test_the_default_stays_unless_clearly_beaten(
    fake_kernel, fake_config, fake_timer, case, store
):
    kernel = fake_kernel()
    kernel.surface = lambda config: (
        1_000_000 - (5_000 if config == fake_config(unroll=True) else 0)
    )
    report = run(kernel, case, store, fake_timer).problems[0].kernels[0]
    assert report.kept_default
    assert report.params == DEFAULT


def test_tuning_again_keeps_the_incumbent_within_noise(
    fake_kernel, fake_config, fake_timer, case, store
):
    kernel = fake_kernel()
    run(kernel, case, store, fake_timer)
    rival = fake_config(block_q=128, block_k=16, unroll=True)
    surface = fake_kernel.surface
    kernel.surface = lambda config: (
        surface(kernel, fake_config(**OPTIMUM)) - 1000
        if config == rival
        else surface(kernel, config)
    )
    assert run(kernel, case, store, fake_timer).problems[0].kernels[0].params == OPTIMUM
    best = rows(store, schema.best)
    assert [row["rev"] for row in best] == [2]
    assert len(rows(store, schema.run)) == 2  # measurements of both runs are kept
    assert len({row["run_id"] for row in rows(store, schema.measurement)}) == 2


def test_kernels_are_compared_and_ranked(fake_kernel, fake_timer, case, store):
    class Rival(fake_kernel):
        name = "rival_forward"

        def surface(self, config):
            return super().surface(config) // 2

    kernels = [fake_kernel(), Rival()]
    report = tune(
        [case], budget_seconds=30, kernels=kernels, timer=fake_timer(*kernels), store=store
    )
    assert report.problems[0].fastest == "rival_forward"
    device = device_key("cpu")
    ranked = lookup.ranking(["fake_forward", "rival_forward"], case.problem, device)
    assert ranked == ("rival_forward", "fake_forward")
    assert lookup.ranking(["unknown", "rival_forward"], case.problem, device) == ()


def test_a_refusing_kernel_is_listed_with_its_reason(fake_kernel, fake_timer, case, store):
    class Picky(fake_kernel):
        name = "picky_forward"

        def unsupported_reasons(self, problem):
            return ["does not like Tuesdays"]

    kernels = [fake_kernel(), Picky()]
    report = tune(
        [case], budget_seconds=30, kernels=kernels, timer=fake_timer(*kernels), store=store
    )
    assert report.problems[0].refused == {"picky_forward": ("does not like Tuesdays",)}
    other = cases.parse("h2 s64 d32")
    both = tune(
        [other, case],
        budget_seconds=30,
        kernels=kernels[:1],
        timer=fake_timer(*kernels),
        store=store,
    )
    assert both.problems[0].refused == {"fake_forward": ("wants head_dim 16",)}
    assert both.problems[1].fastest == "fake_forward"
    with pytest.raises(TuningError, match="does not like Tuesdays"):
        run(kernels[1], case, store, fake_timer)
    assert rows(store, schema.run)[-1]["state"] == "failed"


def test_the_budget_leaves_problems_out_and_says_which(fake_kernel, fake_timer, case, store):
    kernel = fake_kernel()
    other = cases.parse("b1 h2 s60 d16 float32 causal")  # of the same bucket
    options = {"kernels": [kernel], "timer": fake_timer(kernel), "store": store}
    report = tune([case, other, case], budget_seconds=1e-6, **options)
    assert len(report.problems) == 1
    assert report.left_out == ("b1 h2 s64 d16 float32 causal",)
    assert rows(store, schema.run)[0]["state"] == "partial"


def test_progress_is_told(fake_kernel, fake_timer, case, store):
    told = []
    run(fake_kernel(), case, store, fake_timer, progress=told.append)
    assert [one.stage for one in told] == ["verify", *["search"] * 30, "finals", "stored"]
    assert told[1].default_ns == told[1].best_ns
    assert told[30].tried == told[30].feasible == 30


def test_a_space_too_large_or_a_wrong_name_is_an_error(fake_kernel, fake_timer, case, store):
    kernel = fake_kernel()
    kernel.search_space = lambda problem: {"block_q": range(1, 500), "block_k": range(1, 500)}
    with pytest.raises(TuningError, match="search space of fake_forward has 249001"):
        run(kernel, case, store, fake_timer)
    with pytest.raises(TuningError, match="kernel is 'no_such'"):
        tune([case], budget_seconds=1, kernels=["no_such"], store=store)
    with pytest.raises(TuningError, match="budget_seconds is 0"):
        tune([case], budget_seconds=0, store=store)


@pytest.mark.parametrize(
    "features", [{"softcap", "sinks", "lse"}, {"alibi", "bias"}, {"kv_lengths", "lse"}]
)
def test_every_feature_is_verified(features, fake_kernel, fake_timer, case, store):
    problem = dataclasses.replace(
        case.problem, features=frozenset(features), seqlen_q=5, q_offset=59
    )
    report = run(fake_kernel(), Case(problem, case.mask), store, fake_timer)
    assert report.problems[0].kernels[0].params == OPTIMUM


def test_a_problem_that_needs_data_asks_for_its_mask(store):
    from portattn import masks

    mask = masks.documents([0, 10, 64]) & masks.causal()
    problem = dataclasses.replace(cases.parse("h2 s64 d16").problem, program=mask.program)
    with pytest.raises(TuningError, match=r"Case\(problem, mask\)"):
        tune([problem], budget_seconds=1, store=store)


def test_measurements_hold_the_exact_shape(fake_kernel, fake_timer, case, store):
    run(fake_kernel(), case, store, fake_timer)
    shape = json.loads(rows(store, schema.measurement)[0]["shape_json"])
    assert shape["seqlen_q"] == 64
    assert shape["dtype"] == "float32"
