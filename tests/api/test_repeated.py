"""What makes a repeated call cheap: its key, its counters, the driver's launch."""

import collections
import ctypes
import dataclasses

import pytest
import torch

from portattn.backends import cuda_launch, repeated
from portattn.backends.base import AttentionInputs
from portattn.backends.reference.forward import ReferenceConfig, ReferenceForward
from portattn.errors import PortattnError
from tests import fake_driver


def inputs_of(**changed):
    query = torch.zeros(1, 2, 8, 16)
    made = AttentionInputs(
        query, query, query, torch.empty_like(query), None, None, 0, None,
        0.25, 0.0, None, None, None, deterministic=False,
    )  # fmt: skip
    return dataclasses.replace(made, **changed)


def test_equal_calls_have_equal_keys():
    kernel = ReferenceForward()
    first = repeated.call_key(kernel, inputs_of(), ReferenceConfig())
    assert first == repeated.call_key(kernel, inputs_of(), ReferenceConfig())
    assert hash(first) == hash(repeated.call_key(kernel, inputs_of(), ReferenceConfig()))


@pytest.mark.parametrize(
    "changed",
    [
        {"query": torch.zeros(1, 2, 9, 16)},
        {"key": torch.zeros(1, 1, 8, 16)},
        {"value": torch.zeros(1, 2, 8, 24)},
        {"query": torch.zeros(1, 2, 8, 16, dtype=torch.float16)},
        {"query": torch.zeros(1, 8, 2, 16).transpose(1, 2)},
        {"output": torch.zeros(1, 8, 2, 16).transpose(1, 2)},
        {"key": torch.zeros(1, 2, 8, 17)[..., 1:]},
        {"value": torch.zeros(257)[1:].view(1, 2, 8, 16)},
        {"lse": torch.zeros(1, 2, 8)},
        {"alibi_slopes": torch.zeros(2)},
        {"bias": torch.zeros(1, 1, 8, 8).expand(1, 2, 8, 8)},
        {"bias": torch.zeros(1, 2, 8, 8)},
        {"bias": torch.zeros(1, 2, 8, 8, dtype=torch.float16)},
        {"sinks": torch.zeros(2)},
        {"scale": 0.5},
        {"softcap": 2.0},
        {"q_offset": 3},
    ],
)
def test_whatever_launches_depend_on_is_in_the_key(changed):
    kernel, config = ReferenceForward(), ReferenceConfig()
    plain = repeated.call_key(kernel, inputs_of(), config)
    assert repeated.call_key(kernel, inputs_of(**changed), config) != plain


def test_kernel_and_config_are_in_the_key():
    kernel = ReferenceForward()
    plain = repeated.call_key(kernel, inputs_of(), ReferenceConfig())
    assert repeated.call_key(ReferenceForward(), inputs_of(), ReferenceConfig()) != plain
    assert repeated.call_key(kernel, inputs_of(), ReferenceConfig(dtype="input")) != plain


def test_counters_are_kept_and_bounded(monkeypatch):
    monkeypatch.setattr(repeated, "_counters", collections.OrderedDict())
    device = torch.device("cpu")
    first = repeated.arrival_counters(device, 5)
    assert first.numel() >= 5
    assert not first.any()
    assert repeated.arrival_counters(device, 3) is first
    assert repeated.arrival_counters(device, 1000).numel() >= 1000
    for index in range(3 * repeated._MAX_COUNTER_STREAMS):
        repeated._counters[(device, index + 1)] = first
    repeated._counters.pop((device, 0))
    repeated.arrival_counters(device, 1)
    assert len(repeated._counters) == repeated._MAX_COUNTER_STREAMS


def launch_of(arguments):
    return cuda_launch.CudaLaunch(
        77, arguments, threads=128, shared_bytes=4096, device_index=0, name="attend"
    )


def test_a_launch_passes_what_was_written(monkeypatch):
    driver = fake_driver.install(monkeypatch, [5, 128])
    launch = launch_of([b"abcde", bytes(128)])
    assert all((ctypes.addressof(launch.memory) + at) % 128 == 0 for at in launch.offsets)
    launch.launch(9, 1234)
    assert driver.launches[0] == ((77, 9, 1, 1, 128, 1, 1, 4096, 1234), [b"abcde", bytes(128)])
    launch.write(0, b"fghij")
    elsewhere = ctypes.create_string_buffer(bytes(range(128)), 128)
    launch.point(1, ctypes.addressof(elsewhere))
    launch.launch(9, 1234)
    assert driver.launches[1][1] == [b"fghij", bytes(range(128))]
    assert launch.read(0) == b"fghij"
    launch.launch(0, 1234)
    assert len(driver.launches) == 2
    with pytest.raises(ValueError, match="argument 0 has 5 bytes, content has 4"):
        launch.write(0, b"abcd")


def test_a_refused_launch_says_why(monkeypatch):
    fake_driver.install(monkeypatch, [1], status=98)
    with pytest.raises(PortattnError, match=r"attend with 3 blocks of 128 .* 98, no such kernel"):
        launch_of([b"a"]).launch(3, 0)


def test_without_a_driver_library(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(PortattnError, match=r"CUDA driver library .* cannot open"):
        cuda_launch.driver.__wrapped__()
