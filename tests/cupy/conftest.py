"""The emulated kernels stand in the registry like any other."""

import collections

import pytest

from portattn.backends import registry, stream_memory

# As backend "cpu": the tensors are on the CPU.
EMULATED = {
    "cupy_emulated": ("cpu", "tests.cupy.emulated", "EmulatedForwardSm80", ()),
    "cupy_emulated_reversed": ("cpu", "tests.cupy.emulated", "ReversedForwardSm80", ()),
}
EMULATED_SM90 = {
    "sm90_emulated": ("cpu", "tests.cupy.emulated_sm90", "EmulatedForwardSm90", ()),
    "sm90_emulated_reversed": ("cpu", "tests.cupy.emulated_sm90", "ReversedForwardSm90", ()),
    "sm90_emulated_random": ("cpu", "tests.cupy.emulated_sm90", "RandomForwardSm90", ()),
}


@pytest.fixture(autouse=True)
def counters_of_its_own(monkeypatch):
    """A launch that the emulator ends early leaves them as they are."""
    monkeypatch.setattr(stream_memory._counters, "kept", collections.OrderedDict())


def _register(monkeypatch, kernels):
    for name, entry in kernels.items():
        monkeypatch.setitem(registry.KERNELS, name, entry)
    return tuple(kernels)


@pytest.fixture
def emulated_kernels(monkeypatch):
    """Names of the emulated sm_80 kernels; gone again after the test."""
    return _register(monkeypatch, EMULATED)


@pytest.fixture
def emulated_sm90(monkeypatch):
    """Names of the emulated sm_90a kernels; gone again after the test."""
    return _register(monkeypatch, EMULATED_SM90)
