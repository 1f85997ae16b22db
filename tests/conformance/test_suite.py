"""The suite itself: kernels with one fault each must fail, and say how."""

import pytest
import torch

from portattn import call, errors
from portattn.backends import registry
from portattn.backends.reference.forward import ReferenceForward
from portattn.conformance import CASES, Case, check, kernels, outcome, suite
from portattn.conformance.compare import compare


class Faulty(ReferenceForward):
    """The reference, spoilt after (or before) it ran."""

    name = "faulty"
    backend = "cpu"
    fault = staticmethod(lambda inputs: None)
    refusal = ()

    def unsupported_reasons(self, problem):
        return list(self.refusal)

    def run(self, inputs, config):
        super().run(inputs, config)
        self.fault(inputs)


@pytest.fixture
def faulty(monkeypatch):
    kernel = Faulty()
    monkeypatch.setattr(
        registry, "KERNELS", {"faulty": ("cpu", __name__, "Faulty", ())} | registry.KERNELS
    )
    real = registry.kernel
    monkeypatch.setattr(
        registry, "kernel", lambda name: kernel if name == "faulty" else real(name)
    )
    call.clear_cache()
    yield kernel
    call.clear_cache()


def drift(inputs):
    drift.count += 1
    inputs.output[0, 0, 0, 0] *= 1 + drift.count * 2e-7


def past_the_end(inputs):
    flat = inputs.output.as_strided(
        (1,), (1,), inputs.output.storage_offset() + inputs.output.numel()
    )
    flat.fill_(0)


def before_the_lse(inputs):
    inputs.lse.as_strided((1,), (1,), inputs.lse.storage_offset() - 1).fill_(0)


FAULTS = {
    "wrong_output": (lambda inputs: inputs.output.mul_(1.001), "output is off by"),
    "one_entry": (lambda inputs: inputs.output[1, 1, -1, -1].add_(1e-3), "output is off by"),
    "wrong_lse": (lambda inputs: inputs.lse.add_(0.01), "lse is off by"),
    "not_written": (
        lambda inputs: inputs.output[0, 0, 3].fill_(torch.nan),
        "output has 64 NaN or infinite entries",
    ),
    "writes_past_its_output": (past_the_end, "it wrote outside its output"),
    "writes_before_its_lse": (before_the_lse, "it wrote outside its lse"),
    "changes_an_input": (
        lambda inputs: inputs.key[0, 0, 0].neg_(),
        "it changed one of its inputs",
    ),
    "not_deterministic": (drift, "two runs on the same inputs differ"),
    "crash": (lambda inputs: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize(("fault", "detail"), FAULTS.values(), ids=FAULTS)
def test_faults_are_found(faulty, fault, detail):
    drift.count = 0
    suite._expected.cache_clear()
    faulty.fault = fault
    result = outcome("faulty", CASES["causal"], "float32")
    suite._expected.cache_clear()
    assert result.status == "fail"
    assert detail in result.detail
    with pytest.raises(AssertionError, match="faulty, case causal, float32 on cpu"):
        check("faulty", "causal", "float32")
    suite._expected.cache_clear()


def test_wrong_empty_rows_are_found(faulty):
    faulty.fault = lambda inputs: inputs.lse.nan_to_num_(neginf=-1e30)
    assert (
        "lse differs where the reference is infinite"
        in outcome("faulty", CASES["empty_rows"], "float32").detail
    )


def test_nan_must_arrive(faulty):
    faulty.fault = lambda inputs: inputs.output.nan_to_num_(0.0)
    assert "did not reach it" in outcome("faulty", CASES["nan_value"], "float32").detail


def test_a_kernel_without_fault_passes(faulty):
    result = check("faulty", "causal", "bfloat16")
    assert result.status == "pass"
    assert result.output.error <= result.output.allowed
    assert result.lse.error <= result.lse.allowed


def test_refusals_are_told(faulty):
    faulty.refusal = ("head_dim is 64; it must be 65",)
    result = outcome("faulty", CASES["causal"], "float32")
    assert (result.status, result.detail) == ("refused", "head_dim is 64; it must be 65")


def test_the_rule():
    reference = torch.tensor([1.0, -4.0], dtype=torch.float64)
    eager, result = reference.float() + 1e-6, reference.float() + 2.5e-6
    found = compare("output", result, eager, reference, dtype=torch.float32, poisoned=False)
    assert found.allowed == pytest.approx(2 * found.eager_error + 2 * 2**-23 * 4)
    assert found.passes
    assert not compare(
        "output", result + 1e-6, eager, reference, dtype=torch.float32, poisoned=False
    ).passes


def test_kernels_by_name():
    assert kernels(None) == list(registry.KERNELS)
    assert kernels(["reference", "cpu"]) == ["cpu_decode", "cpu_forward", "reference"]
    with pytest.raises(errors.ConfigError, match="backend is 'gpu'"):
        kernels(["gpu"])


def test_cases_are_named_once_and_cover_the_features():
    assert all(name == case.name for name, case in CASES.items())
    for feature in (
        "softcap",
        "alibi",
        "bias",
        "sinks",
        "kv_lengths",
        "scale",
        "q_offset",
        "poison",
    ):
        assert any(
            getattr(case, feature) != getattr(Case("default"), feature) for case in CASES.values()
        )
    presets = {
        "local",
        "sliding_window",
        "longformer",
        "bigbird",
        "strided",
        "fixed",
        "dilated",
        "prefix_lm",
        "streaming_llm",
        "documents",
        "padding",
        "block_sparse",
        "dense_mask",
        "causal",
    }
    assert presets <= set(CASES)
