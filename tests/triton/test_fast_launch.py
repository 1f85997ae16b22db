"""Launching what Triton compiled without Triton's launcher: the parameters, and when not to."""

import re
import struct
import weakref

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from portattn.backends import repeated
from portattn.backends.base import AttentionInputs
from portattn.backends.triton import aot, fast_launch
from portattn.backends.triton.config import TritonForwardConfig
from portattn.backends.triton.fast_launch import RepeatedLaunch
from portattn.backends.triton.forward_kernel import forward_kernel
from portattn.backends.triton.variant import PassShape, make_variant
from portattn.problem import AttentionProblem
from tests import fake_driver

DEVICE = torch.device("cuda", 0)
OPTIONS = {"num_warps": 2, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["count", "factor"])
def scale_rows(
    target, source, count: triton.language.int64, factor, SIZE: triton.language.constexpr
):
    """Something small."""
    offsets = triton.language.arange(0, SIZE)
    values = triton.language.load(source + offsets, mask=offsets < count)
    triton.language.store(target + offsets, values * factor)


def compiled(kernel, signature, constants, attributes=None):
    """As a first launch on an H100 would return it."""
    source = ASTSource(kernel, signature, constants, attributes or {})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS)
    made.function = 4711
    return made


def parameter_sizes(made):
    """Bytes of each parameter, as the PTX declares them."""
    entry = made.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    sizes = []
    for line in entry.splitlines():
        array = re.search(r"\.param .*\.b8 \w+\[(\d+)\]", line)
        scalar = re.search(r"\.param \.[usbf](\d+)", line)
        if array or scalar:
            sizes.append(int(array[1]) if array else int(scalar[1]) // 8)
    return sizes


class FakeKernel:
    """Compiles nothing: its launches return what was compiled before."""

    def __init__(self, made):
        self.made, self.pre_run_hooks, self.launches = made, [], []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append((grid, arguments, options))
            return self.made

        return launch


@pytest.fixture
def small(monkeypatch):
    """A launch of scale_rows, its kernel and the driver."""
    monkeypatch.setattr(fast_launch, "current_stream", lambda index: 99)
    signature = {
        "target": "*fp32", "source": "*fp32", "count": "i64", "factor": "fp32",
        "SIZE": "constexpr",
    }  # fmt: skip
    aligned = {(1,): [["tt.divisibility", 16]]}
    made = compiled(scale_rows, signature, {"SIZE": 64}, aligned)
    kernel = FakeKernel(made)
    sizes = parameter_sizes(made)
    driver = fake_driver.install(monkeypatch, sizes)
    arguments = [None, None, 10, 0.5, 64]
    moving = {0: None, 1: None}
    launch = RepeatedLaunch(kernel, 7, arguments, moving, {"num_warps": 2}, DEVICE)
    return launch, kernel, driver


def tensors():
    return [torch.zeros(64), torch.zeros(64)]


def test_the_first_launch_is_tritons_and_later_ones_are_the_drivers(small):
    launch, kernel, driver = small
    first, later = tensors(), tensors()
    launch(first)
    assert kernel.launches == [((7,), (*first, 10, 0.5, 64), {"num_warps": 2})]
    assert not driver.launches
    for pair in (later, first):
        launch(pair)
        fixed, parameters = driver.launches[-1]
        assert fixed == (4711, 7, 1, 1, 64, 1, 1, kernel.made.metadata.shared, 99)
        expected = struct.pack("=QQ", *(tensor.data_ptr() for tensor in pair))
        assert b"".join(parameters) == expected + struct.pack("=qfQQ", 10, 0.5, 0, 0)
    assert len(kernel.launches) == 1


def test_moving_tensors_are_not_kept(small):
    launch, kernel, _ = small
    pair = tensors()
    launch(pair)
    launch(pair)
    kernel.launches.clear()
    kept = weakref.ref(pair[0])
    del pair
    assert kept() is None


def test_a_hook_sees_every_launch(small):
    launch, kernel, driver = small
    launch(tensors())

    def hook(metadata):
        """Nothing."""

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        launch(tensors())
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    kernel.pre_run_hooks.append(hook)
    launch(tensors())
    assert (len(kernel.launches), len(driver.launches)) == (3, 0)
    kernel.pre_run_hooks.clear()
    launch(tensors())
    assert (len(kernel.launches), len(driver.launches)) == (3, 1)


def test_an_address_that_the_variant_was_not_compiled_for_goes_through_triton(small):
    launch, kernel, driver = small
    launch(tensors())
    target, source = torch.zeros(65)[1:], torch.zeros(65)[1:]
    launch([target, torch.zeros(64)])
    assert (len(kernel.launches), len(driver.launches)) == (1, 1)
    launch([torch.zeros(64), source])
    assert (len(kernel.launches), len(driver.launches)) == (2, 1)


@pytest.mark.parametrize(
    "name",
    ["launch_pdl", "launch_cooperative_grid", "global_scratch_size", "profile_scratch_size"],
)
def test_special_launches_go_through_triton(small, name):
    launch, kernel, driver = small
    kernel.made.metadata = kernel.made.metadata._replace(**{name: 1})
    for _ in range(3):
        launch(tensors())
    assert (len(kernel.launches), len(driver.launches)) == (3, 0)


def test_the_interpreter_goes_through_triton(small):
    launch, kernel, driver = small
    kernel.made = None
    for _ in range(3):
        launch(tensors())
    assert (len(kernel.launches), len(driver.launches)) == (3, 0)


def test_a_call_of_direct_launches_is_repeated(small):
    launch, kernel, driver = small
    sources = [(repeated.OUTPUT, 0), (repeated.SCRATCH, 8)]
    assert fast_launch.repeated_call([(launch, sources)], DEVICE) is None
    launch(tensors())
    call = fast_launch.repeated_call([(launch, sources)], torch.device("cpu", 0))
    target = torch.zeros(64)
    inputs = AttentionInputs(
        target, target, target, target, None, None, 0, None,
        0.25, 0.0, None, None, None, deterministic=False,
    )  # fmt: skip
    assert call.fits(inputs)
    call.run(inputs)
    expected = struct.pack("=QQ", target.data_ptr(), 8)
    assert b"".join(driver.launches[-1][1]).startswith(expected)
    kernel.pre_run_hooks.append(print)
    assert not call.fits(inputs)


@pytest.mark.parametrize("tma", [False, True])
def test_the_forward_kernel_takes_its_parameters_as_laid_out(monkeypatch, tma):
    problem = AttentionProblem(
        "cuda", "float16", 1, 2, 2, 64, 64, 64, 64, features=frozenset({"lse"})
    )
    config = TritonForwardConfig(64, 64, 4, 2, 2, tma)
    inputs = aot.example_inputs(problem)
    variant = make_variant(
        inputs, config, PassShape(0, 1, stepped=False, ids=False), arch="sm_90", vector=8,
        tma=tma, pieces=False, first=True, last=True,
    )  # fmt: skip
    signature, constants = aot._signature(inputs, variant, problem.dtype)
    made = compiled(forward_kernel, signature, constants)
    tensor = torch.zeros(1, 2, 64, 64, dtype=torch.float16)
    maps = []
    monkeypatch.setattr(
        fast_launch, "map_bytes", lambda descriptor, form: maps.append(form) or bytes(128)
    )
    arguments = []
    for kind in signature.values():
        if kind.startswith("tensordesc"):
            sizes, strides = list(tensor.shape), list(tensor.stride())
            arguments.append(TensorDescriptor(tensor, sizes, strides, [1, 1, 64, 64]))
        else:
            arguments.append(tensor if kind.startswith("*") else 1)
    moving = {0: None} | ({3: lambda tensor: None, 4: lambda tensor: None} if tma else {})
    fake_driver.install(monkeypatch, [])
    direct = fast_launch._direct(made, (1, 1), arguments, moving, 0)
    assert [len(argument) for argument in direct.launch.arguments] == parameter_sizes(made)
    assert len(maps) == 2 * tma
    assert [patch.is_map for patch in direct.launch.patches] == [False] + [True, True] * tma
