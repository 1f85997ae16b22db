"""The conformance suite's gradients, bound to the kernels that have a backward."""

import pytest
import torch

from portattn import call
from portattn.backends import registry
from portattn.conformance import CASES, DTYPES, check_gradients, gradients

CASES_WITH_GRADIENTS = [name for name, case in CASES.items() if not case.poison]
HALVES = ("float16", "bfloat16")


# Eager gradients in half precision take longest: some cases have one of them, by turns.
def dtypes(number):
    case = CASES[CASES_WITH_GRADIENTS[number]]
    is_small = case.batch * case.num_heads < 16
    return ("float32", HALVES[number // 3 % 2]) if number % 3 == 0 and is_small else ("float32",)


@pytest.mark.parametrize("number", range(len(CASES_WITH_GRADIENTS)), ids=CASES_WITH_GRADIENTS)
def test_cpu(number):
    for dtype in dtypes(number):
        assert check_gradients("cpu_forward", CASES_WITH_GRADIENTS[number], dtype).status == "pass"


@pytest.mark.parametrize("case", ["causal", "gqa_4", "all_terms", "empty_rows", "kv_lengths"])
def test_reference(case):
    assert check_gradients("reference", case, "float32").status == "pass"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cupy"])
@pytest.mark.parametrize("case", CASES_WITH_GRADIENTS)
def test_gpu(case, backend):
    assert torch.cuda.is_available()
    for name, entry in registry.KERNELS.items():
        if entry[0] == backend and registry.kernel(name).has_backward:
            for dtype in DTYPES:
                check_gradients(name, case, dtype, "cuda")


class Faulty(type(registry.kernel("cpu_forward"))):
    """The CPU kernel, with gradients spoilt after they were computed."""

    name = "faulty"
    fault = staticmethod(lambda inputs, gradients: None)

    def backward(self, inputs, gradients, config):
        super().backward(inputs, gradients, config)
        self.fault(inputs, gradients)


@pytest.fixture
def faulty(monkeypatch):
    kernel, real = Faulty(), registry.kernel
    monkeypatch.setitem(registry.KERNELS, "faulty", ("cpu", __name__, "Faulty", ()))
    monkeypatch.setattr(
        registry, "kernel", lambda name: kernel if name == "faulty" else real(name)
    )
    call.clear_cache()
    yield kernel
    call.clear_cache()


def before_the_query(inputs, got):
    target = got.query
    target.as_strided((1,), (1,), target.storage_offset() - 1).fill_(0)


def drift(inputs, got):
    drift.count += 1
    got.value[0, 0, 0, 0] *= 1 + drift.count * 2e-7


FAULTS = {
    "wrong": (lambda inputs, got: got.key.mul_(1.001), "gradient by key is off by"),
    "not_written": (
        lambda inputs, got: got.value[0, 0, 3].fill_(torch.nan),
        "gradient by value has 64 NaN",
    ),
    "outside": (before_the_query, "it wrote outside the gradient by query"),
    "changes_an_input": (
        lambda inputs, got: inputs.key[0, 0, 0].neg_(),
        "it changed one of its inputs",
    ),
    "not_deterministic": (drift, "two deterministic runs on the same inputs differ"),
}


@pytest.mark.parametrize(("fault", "detail"), FAULTS.values(), ids=FAULTS)
def test_faults_are_found(faulty, fault, detail):
    drift.count = 0
    gradients._expected.cache_clear()
    faulty.fault = fault
    with pytest.raises(AssertionError, match=detail):
        check_gradients("faulty", "sliding_window", "float32")
    gradients._expected.cache_clear()
