"""The emulated kernels stand in the registry like any other."""

import pytest

from portattn.backends import registry

# As backend "cpu": the tensors are on the CPU.
EMULATED = {
    "cupy_emulated": ("cpu", "tests.cupy.emulated", "EmulatedForwardSm80", ()),
    "cupy_emulated_reversed": ("cpu", "tests.cupy.emulated", "ReversedForwardSm80", ()),
}


@pytest.fixture
def emulated_kernels(monkeypatch):
    """Their names; gone again after the test."""
    for name, entry in EMULATED.items():
        monkeypatch.setitem(registry.KERNELS, name, entry)
    return tuple(EMULATED)
