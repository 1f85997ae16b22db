"""The conformance suite, bound to every kernel."""

import pytest
import torch

from portattn.backends import registry
from portattn.conformance import CASES, DTYPES, check

CPU_KERNELS = [
    name for name, entry in registry.KERNELS.items() if entry[0] in ("cpu", "reference")
]
# What a kernel may refuse on its own kind of device, by a word of the reason. All else it must
# compute.
MAY_REFUSE = {"cpu_decode": "seqlen_q", "triton_decode": "forward kernel"}


def run(kernel, case, device):
    for dtype in DTYPES:
        result = check(kernel, case, dtype, device)
        if result.status == "refused":
            assert MAY_REFUSE.get(kernel, "nothing may be refused") in result.detail


# Kernels change fastest: a case's float64 reference is computed once for all of them.
@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_cpu(case, kernel):
    run(kernel, case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [name for name in registry.KERNELS if name not in CPU_KERNELS])
@pytest.mark.parametrize("case", CASES)
def test_gpu(case, kernel):
    assert torch.cuda.is_available()
    run(kernel, case, "cuda")


def test_every_kernel_is_bound_somewhere():
    backends = {entry[0] for entry in registry.KERNELS.values()}
    assert backends == {"reference", "cpu", "triton", "cupy"}
