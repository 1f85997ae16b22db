"""What makes a repeated call cheap: its key, its counters, the driver's launch."""

import collections
import ctypes
import dataclasses
import struct

import pytest
import torch

from portattn import attention
from portattn.backends import cuda_launch, repeated, stream_memory
from portattn.backends.base import AttentionInputs
from portattn.backends.cuda_launch import Launch, Launches, Patch
from portattn.backends.reference.forward import ReferenceConfig, ReferenceForward
from portattn.backends.repeated import RepeatedCall
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
    kept = collections.OrderedDict()
    monkeypatch.setattr(stream_memory._counters, "kept", kept)
    device = torch.device("cpu")
    first = stream_memory.arrival_counters(device, 5)
    assert first.numel() >= 5
    assert not first.any()
    assert stream_memory.arrival_counters(device, 3) is first
    assert stream_memory.arrival_counters(device, 1000).numel() >= 1000
    for index in range(3 * stream_memory.MAX_STREAMS):
        kept[(device, index + 1)] = first
    kept.pop((device, 0))
    stream_memory.arrival_counters(device, 1)
    assert len(kept) == stream_memory.MAX_STREAMS


def launches_of(arguments, patches=(), num_sources=1, grid=9):
    launch = Launch(77, arguments, grid, 128, 4096, "attend", patches)
    return Launches([launch, launch], num_sources=num_sources, device_index=0)


def test_a_launch_passes_what_changed(monkeypatch):
    driver = fake_driver.install(monkeypatch, [20, 128, 4])
    arguments = [bytes(range(20)), bytes(128), b"last"]
    patches = [Patch(0, 4, 1), Patch(0, 12, 0, 5), Patch(1, 0, 1, is_map=True)]
    launches = launches_of(arguments, patches, num_sources=2)
    for addresses in ((2**40, 2**63 + 16), (7, 9)):
        driver.launches.clear()
        launches.run(addresses, 1234)
        struct_bytes = struct.pack("=4sQQ", bytes(range(4)), addresses[1], addresses[0] + 5)
        map_bytes = bytearray(128)
        map_bytes[16:24] = struct.pack("=Q", addresses[1])
        expected = ((77, 9, 1, 1, 128, 1, 1, 4096, 1234), [struct_bytes, map_bytes, b"last"])
        assert driver.launches == [expected, expected]


def test_no_blocks_are_no_launch(monkeypatch):
    driver = fake_driver.install(monkeypatch, [1])
    launches_of([b"a"], grid=0).run([0], 0)
    assert not driver.launches


def test_a_refused_launch_says_why(monkeypatch):
    driver = fake_driver.install(monkeypatch, [1], status=98)
    with pytest.raises(PortattnError, match=r"attend with 9 blocks of 128 .* 98, no such kernel"):
        launches_of([b"a"]).run([0], 0)
    assert len(driver.launches) == 1


def test_arguments_that_libportattn_has_no_room_for(monkeypatch):
    fake_driver.install(monkeypatch, [])
    with pytest.raises(PortattnError, match="attend has 1 arguments of 9000 bytes"):
        launches_of([bytes(9000)])


class Recorded:
    """Launches that are only written down."""

    def __init__(self):
        self.addresses = []

    def run(self, addresses, stream):
        self.addresses.append(tuple(addresses))


def test_a_call_is_repeated_with_its_own_addresses():
    launches, device = Recorded(), torch.device("cpu")
    call = RepeatedCall(launches, device, scratch_floats=100, num_counters=3)
    first, other = inputs_of(), inputs_of(lse=torch.zeros(1, 2, 8), sinks=torch.zeros(4))
    tensors = (other.query, other.key, other.value, other.output, other.lse)
    terms = (None, None, None, other.sinks)
    assert not call.again(*tensors, terms)  # no call yet
    assert call.run(first) is False
    call.used = False
    assert call.again(*tensors, terms)
    assert call.used
    assert call.again(*tensors, None)
    with_sinks, without = launches.addresses[1:]
    assert with_sinks[:5] == tuple(tensor.data_ptr() for tensor in tensors)
    assert with_sinks[repeated.SINKS] == other.sinks.data_ptr()
    assert without[repeated.SINKS] == 0
    # Scratch and counters are the stream's.
    assert {one[9:] for one in launches.addresses} == {with_sinks[9:]}
    assert all(with_sinks[9:])


@pytest.mark.parametrize("name", ["query", "value", "output", "lse", "sinks"])
def test_misaligned_tensors_are_not_repeated(name):
    call = RepeatedCall(Recorded(), torch.device("cpu"))
    inputs = inputs_of(lse=torch.zeros(1, 2, 8), sinks=torch.zeros(2))
    call.run(inputs)
    assert call.fits(inputs)
    tensor = getattr(inputs, name)
    odd = torch.zeros(tensor.numel() + 1)[1:].view(tensor.shape)
    changed = dataclasses.replace(inputs, **{name: odd})
    parts = [getattr(changed, one) for one in ("query", "key", "value", "output", "lse")]
    assert not call.fits(changed)
    assert not call.again(*parts, (None, None, None, changed.sinks))


def test_passes_have_scratch_of_their_own():
    launches = Recorded()
    call = RepeatedCall(launches, torch.device("cpu"), scratch_floats=64, num_launches=2)
    call.run(inputs_of())
    kept = call._places[0]
    assert kept[1] == 0
    inputs = inputs_of()
    assert call.again(inputs.query, inputs.key, inputs.value, inputs.output, None, None)
    assert launches.addresses[-1][repeated.SCRATCH] != 0


def test_a_guard_is_asked_each_time():
    answers = []
    call = RepeatedCall(Recorded(), torch.device("cpu"), guard=lambda: answers.append(0) or False)
    inputs = inputs_of()
    call.run(inputs)
    assert not call.again(inputs.query, inputs.key, inputs.value, inputs.output, None, None)
    assert not call.fits(inputs)
    assert len(answers) == 2


def test_without_a_driver_library(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(PortattnError, match=r"CUDA driver library .* cannot open"):
        cuda_launch.driver.__wrapped__()


def test_a_sign_that_is_not_applied_yet_counts():
    """The memory of ``x.conj().imag`` holds the other sign; also where the call was seen."""
    query, key, value = (torch.randn(1, 2, 32, 16) for _ in range(3))
    bias = torch.randn(1, 2, 32, 32, dtype=torch.complex64).conj().imag
    assert bias.is_neg()
    plain = bias.clone(memory_format=torch.preserve_format).resolve_neg()
    expected = attention(query, key, value, bias=plain)
    assert torch.equal(attention(query, key, value, bias=bias), expected)
    negated = attention(-query, key, value)
    assert torch.equal(attention(torch._neg_view(query), key, value), negated)
