"""Which kernel and which config: preference, refusals, the rungs, and explain()."""

import dataclasses
import warnings

import pytest
import torch

from portattn import call, dispatch, errors, explain, masks
from portattn.backends import registry
from portattn.backends.reference.forward import ReferenceConfig, ReferenceForward
from portattn.problem import AttentionProblem
from portattn.tuning_db import TuningDatabaseWarning, lookup

Q = torch.zeros(1, 2, 64, 32)
PROBLEM = AttentionProblem("cpu", "float32", 1, 2, 2, 64, 64, 32, 32)


class Tuned(ReferenceForward):
    """A kernel with a search space."""

    name = "tuned"
    backend = "cpu"
    has_backward = False

    def search_space(self, problem):
        return {"dtype": ("float64", "input")}


class Picky(Tuned):
    """A kernel that refuses everything."""

    name = "picky"

    def unsupported_reasons(self, problem):
        return ["head_dim is 32; it must be 64", "seqlen_q is 64; it must be 1"]


class Second(Tuned):
    name = "second"


CLASSES = {"picky": Picky, "tuned": Tuned, "second": Second}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """Three kernels of ours in front of the real ones, and nothing in the database."""
    ours = {name: ("cpu", __name__, owner.__name__, ()) for name, owner in CLASSES.items()}
    real = registry.kernel
    monkeypatch.setattr(registry, "KERNELS", ours | registry.KERNELS)
    monkeypatch.setattr(
        registry, "kernel", lambda name: CLASSES[name]() if name in CLASSES else real(name)
    )
    stored(monkeypatch, None)
    monkeypatch.setattr(lookup, "ranking", lambda names, problem, device: ())
    call.clear_cache()
    dispatch._warn_once.cache_clear()
    yield
    call.clear_cache()


def stored(monkeypatch, found):
    monkeypatch.setattr(lookup, "find", lambda *arguments, **options: found)
    dispatch.clear_cache()


def test_the_first_that_refuses_nothing():
    choice = dispatch.choose(PROBLEM)
    assert choice.kernel_name == "tuned"
    assert choice.reasons["picky"] == (
        "head_dim is 32; it must be 64",
        "seqlen_q is 64; it must be 1",
    )
    assert choice.config == ReferenceConfig()
    assert choice.rung == "default"


def test_a_kernel_may_go_first_where_it_is_known_to_be_the_fastest(monkeypatch):
    monkeypatch.setattr(Second, "is_preferred", lambda self, problem: problem.seqlen_q == 64)
    assert dispatch.choose(PROBLEM).kernel_name == "second"
    assert dispatch.choose(PROBLEM, "cpu").kernel_name == "second"
    shorter = dataclasses.replace(PROBLEM, seqlen_q=32)
    assert dispatch.choose(shorter).kernel_name == "tuned"
    monkeypatch.setattr(lookup, "ranking", lambda names, problem, device: ("tuned", "second"))
    dispatch.clear_cache()
    assert dispatch.choose(PROBLEM).kernel_name == "tuned"


def test_measured_kernels_overrule_the_order(monkeypatch):
    monkeypatch.setattr(lookup, "ranking", lambda names, problem, device: ("second", "tuned"))
    assert dispatch.choose(PROBLEM).kernel_name == "second"
    assert dispatch.choose(PROBLEM, "tuned").kernel_name == "tuned"


def test_auto_never_takes_the_reference(monkeypatch):
    monkeypatch.setattr(
        registry,
        "KERNELS",
        {"picky": registry.KERNELS["picky"], "reference": registry.KERNELS["reference"]},
    )
    with pytest.raises(errors.UnsupportedError) as caught:
        dispatch.choose(PROBLEM)
    assert list(caught.value.reasons) == ["picky"]
    assert dispatch.choose(PROBLEM, "reference").kernel_name == "reference"


@pytest.mark.parametrize("rung", ["exact", "family", "seeds", "nearest"])
def test_rungs(monkeypatch, rung):
    stored(monkeypatch, ({"dtype": "input"}, rung))
    choice = dispatch.choose(PROBLEM)
    assert (choice.config, choice.rung) == (ReferenceConfig("input"), rung)
    given = dispatch.choose(PROBLEM, config={"dtype": "float64"})
    assert (given.config, given.rung) == (ReferenceConfig("float64"), "caller")


@pytest.mark.parametrize(
    "values",
    [{"dtype": "float8"}, {"dtype": 3}, {"block_q": 64}],
    ids=["impossible", "type", "field"],
)
def test_an_unusable_stored_config_is_a_miss_and_one_warning(monkeypatch, values):
    stored(monkeypatch, (values, "exact"))
    with pytest.warns(
        TuningDatabaseWarning, match="holds a config for tuned .*cannot run.*portattn tune"
    ) as caught:
        choice = dispatch.choose(PROBLEM)
    assert len(caught) == 1
    assert (choice.config, choice.rung) == (ReferenceConfig(), "default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.clear_cache()
        dispatch.choose(PROBLEM)


def test_a_stored_default_stands_for_every_shape(monkeypatch):
    stored(monkeypatch, ({}, "exact"))
    choice = dispatch.choose(PROBLEM)
    assert (choice.config, choice.rung) == (ReferenceConfig(), "exact")


def test_float64_and_gradients_are_refused_for_every_kernel_without():
    wide = AttentionProblem("cpu", "float64", 1, 2, 2, 64, 64, 32, 32)
    assert "float64" in dispatch.refusals("tuned", wide)[0]
    grad = AttentionProblem(
        "cpu", "float32", 1, 2, 2, 64, 64, 32, 32, features=frozenset({"grad"})
    )
    assert dispatch.refusals("tuned", grad) == (dispatch.NO_BACKWARD,)
    assert dispatch.refusals("reference", grad) == ()


def test_a_kernel_that_cannot_be_imported(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(
        registry.KERNELS, "lost", ("cpu", "portattn.backends.cpu.lost", "Lost", ())
    )
    assert "cannot be imported: No module named" in dispatch.refusals("lost", PROBLEM)[0]


def test_the_interpreter_runs_only_when_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(registry, "missing_packages", lambda name: [])
    assert (
        "runs on cuda tensors" in dispatch.refusals("triton_forward", PROBLEM, is_named=False)[0]
    )


def test_explain():
    got = explain(Q, Q, Q, masks.sliding_window(8), softcap=1.0, config={"dtype": "input"})
    assert (got.kernel, got.config, got.rung, got.backend) == (
        "tuned",
        ReferenceConfig("input"),
        "caller",
        "auto",
    )
    assert set(got.refused) == set(registry.KERNELS) - {"tuned"}
    assert got.refused["picky"] == (
        "head_dim is 32; it must be 64",
        "seqlen_q is 64; it must be 1",
    )
    assert got.refused["second"] == ("could run it, but tuned comes first",)
    assert got.refused["reference"] == ('never taken by backend="auto"; pass backend="reference"',)
    text = str(got)
    assert "kernel   tuned" in text
    assert "config   dtype=input  [caller]" in text
    assert "terms    softcap" in text
    assert "not used picky: head_dim is 32; it must be 64; seqlen_q is 64" in text


def test_explain_a_named_backend():
    got = explain(Q, Q, Q, backend="reference")
    assert got.kernel == "reference"
    assert got.refused["tuned"] == ("backend='reference' does not name it",)


def test_explain_what_nothing_can_run():
    got = explain(Q, Q, Q, backend="picky")
    assert (got.kernel, got.config, got.rung) == (None, None, "none")
    assert "kernel   none" in str(got)


def test_explain_checks_the_call():
    with pytest.raises(errors.ShapeError, match="enable_gqa"):
        explain(Q, Q[:, :1], Q[:, :1])
    with pytest.raises(errors.ConfigError, match="layout"):
        explain(Q, Q, Q, layout="sbhd")
