"""What is refused by name: absent backends, gradients, transforms, other devices and tensors."""

import re

import pytest
import torch

from portattn import attention, errors, explain, validation
from portattn import call as call_module
from portattn.backends import registry
from portattn.backends.cpu.forward import CpuForward
from portattn.device import device_key

Q = torch.randn(2, 4, 10, 16)


def call(query=Q, key=Q, value=Q, **options):
    options.setdefault("backend", "reference")
    return attention(query, key, value, **options)


def test_a_backend_that_is_absent(monkeypatch):
    monkeypatch.setitem(
        registry.KERNELS, "triton_forward", ("triton", "nowhere", "Nothing", ("no_such_package",))
    )
    with pytest.raises(errors.UnsupportedError) as caught:
        call(backend="triton_forward")
    assert caught.value.reasons == {
        "triton_forward": [
            "package no_such_package is not installed: pip install 'portattn[triton]'"
        ]
    }
    assert "backend is 'triton_forward'" in str(caught.value)
    assert 'pass backend="reference"' in str(caught.value)


def test_a_named_backend_does_not_fall_back():
    with pytest.raises(errors.UnsupportedError) as caught:
        call(backend="cupy")
    reasons = [reason for why in caught.value.reasons.values() for reason in why]
    assert reasons
    assert "batch 2, heads 4/4, lengths 10/10, head_dim 16/16" in str(caught.value)


@pytest.fixture
def no_cpu_backward(monkeypatch):
    monkeypatch.setattr(CpuForward, "has_backward", False)
    call_module.clear_cache()
    yield
    call_module.clear_cache()


@pytest.mark.usefixtures("no_cpu_backward")
def test_gradients_where_no_kernel_has_them():
    leaf = Q.clone().requires_grad_()
    with pytest.raises(errors.UnsupportedError) as caught:
        call(query=leaf, backend="auto")
    text = str(caught.value)
    assert "backend is 'auto'" in text
    assert "requires grad" in text
    assert 'backend="reference"' in text
    assert "torch.no_grad()" in text
    assert "cpu_forward" in caught.value.reasons
    with torch.no_grad():
        call(query=leaf, backend="auto")


@pytest.mark.usefixtures("no_cpu_backward")
def test_gradients_of_bias_alone():
    bias = torch.zeros(10, 10, requires_grad=True)
    with pytest.raises(errors.UnsupportedError, match="bias, sinks or alibi_slopes requires grad"):
        call(bias=bias, backend="auto")
    assert "grad" in explain(Q, Q, Q, bias=bias, backend="reference").problem.features


def test_functorch_is_refused_by_name():
    with pytest.raises(
        errors.UnsupportedError, match=r"query is a tensor of a torch.func transform \(vmap"
    ):
        torch.func.vmap(lambda query: call(query=query[None]))(Q)
    with pytest.raises(errors.UnsupportedError, match=r"torch.func transform .* call it outside"):
        torch.func.grad(lambda query: call(query=query).sum())(Q)


def test_functorch_is_refused_by_the_op():
    def through_op(query):
        return torch.ops.portattn.attention.default(
            query,
            Q,
            Q,
            [],
            [],
            None,
            "start",
            None,
            None,
            None,
            None,
            None,
            0.0,
            False,
            False,
            "reference",
            "",
        )[0]

    with pytest.raises(errors.UnsupportedError, match=r"torch.func"):
        torch.func.vmap(through_op)(torch.stack([Q, Q]))


def test_dtensor_is_refused_by_name():
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(
        errors.UnsupportedError,
        match=re.escape(
            "key is a DTensor, which attention() does not shard yet: pass the local tensors "
            "(tensor.to_local())"
        ),
    ):
        call(key=Q.as_subclass(DTensor))


def test_other_devices_are_refused_by_name():
    # A stand-in: this machine has no such device.
    tensor = type(
        "Tensor", (torch.Tensor,), {"device": property(lambda self: torch.device("mps", 0))}
    )
    with pytest.raises(
        errors.UnsupportedError,
        match=r"query is on device 'mps:0'; supported are cpu and cuda.*query.cpu\(\)",
    ):
        validation.check_type("query", Q.as_subclass(tensor))
    with pytest.raises(ValueError, match="device is 'mps'; a DeviceKey exists for"):
        device_key("mps")
