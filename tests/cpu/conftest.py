"""Fixtures of the CPU kernel tests."""

import pytest

from portattn.backends.cpu import abi
from portattn.backends.cpu.decode import CpuDecode
from portattn.backends.cpu.forward import CpuForward
from tests.cpu.cases import available_isas


@pytest.fixture(params=available_isas())
def isa(request):
    """Runs the test once with each instruction set of this machine."""
    assert abi.functions().portattn_cpu_select_isa(request.param.encode()) == 0
    yield request.param
    abi.functions().portattn_cpu_select_isa(None)


@pytest.fixture(params=["cpu_forward", "cpu_decode"])
def kernel(request):
    """Both kernels."""
    return CpuForward() if request.param == "cpu_forward" else CpuDecode()
