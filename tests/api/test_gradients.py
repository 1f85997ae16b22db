"""Gradients through autograd and torch.compile, on the CPU backend; the numbers are the
conformance suite's business."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

from portattn import attention, errors, masks

WINDOW = masks.sliding_window(24)


def leaves(seqlen=70, heads=4, kv_heads=2, dtype=torch.float32):
    return [
        torch.randn(1, count, seqlen, 16, dtype=dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def call(query, key, value, backend="cpu", **options):
    return attention(query, key, value, WINDOW, enable_gqa=True, backend=backend, **options)


def gradients(tensors, backend, **options):
    output, lse = call(*tensors, backend=backend, return_lse=True, **options)
    return torch.autograd.grad((output.square().sum() + lse.sin().sum()), tensors)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_gradients_are_the_references(layout):
    tensors = leaves()
    if layout == "bshd":
        tensors = [tensor.detach().transpose(1, 2).requires_grad_() for tensor in tensors]
    got = gradients(tensors, "cpu", layout=layout)
    expected = gradients(tensors, "reference", layout=layout)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_terms():
    tensors = leaves()
    terms = {
        "bias": torch.randn(4, 1, 70, requires_grad=True),
        "sinks": torch.randn(4, requires_grad=True),
        "alibi_slopes": torch.rand(1, 4, requires_grad=True),
    }

    def found(backend):
        output = call(*tensors, backend=backend, softcap=3.0, **terms)
        return torch.autograd.grad(output.square().sum(), [*tensors, *terms.values()])

    torch.testing.assert_close(found("cpu"), found("reference"), rtol=1e-3, atol=1e-4)


def test_one_gradient_only():
    query, key, value = leaves()
    for tensor in (query, value):
        tensor.requires_grad_(False)
    call(query, key, value).square().sum().backward()
    assert query.grad is None
    assert value.grad is None
    expected = torch.autograd.grad(call(query, key, value, "reference").square().sum(), key)[0]
    torch.testing.assert_close(key.grad, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_broadcast_loss():
    query, key, value = leaves()
    call(query, key, value).sum().backward()  # its gradient has strides of 0
    assert query.grad.isfinite().all()


def test_few_queries_take_the_main_kernels_backward():
    query, key, value = leaves(seqlen=40)
    row = query[:, :, -2:].detach().requires_grad_()
    results = [
        torch.autograd.grad(
            call(row, key, value, backend, q_offset="end").square().sum(), (row, key)
        )
        for backend in ("cpu", "cpu_decode", "reference")
    ]
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1], results[2], rtol=1e-4, atol=1e-5)


def test_opcheck():
    query, key, value = leaves(seqlen=20)
    arguments = (
        query, key, value, list(WINDOW.program), [], None, "start", None, None, None, None, None,
        0.0, True, False, "cpu", "",
    )  # fmt: skip
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.portattn.attention.default, arguments, test_utils=checks)


# Through inductor with the reference: test_op.py.
def test_compiled_forward_and_backward():
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (40, 65):
        tensors = leaves(seqlen)
        got = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
        expected = torch.autograd.grad(call(*tensors).square().sum(), tensors)
        torch.testing.assert_close(got, expected)
    torch._dynamo.reset()


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        output = function()
    return saved, output


def test_what_is_kept_for_the_backward():
    tensors = leaves()
    saved, output = saved_by(lambda: call(*tensors))
    pointers = {tensor.data_ptr() for tensor in saved}
    lse = [tensor for tensor in saved if tensor.shape == output.shape[:3]]
    assert pointers == {*(t.data_ptr() for t in (*tensors, output)), lse[0].data_ptr()}
    with torch.no_grad():
        saved, output = saved_by(lambda: call(*tensors))
    assert saved == []
    assert output.grad_fn is None


def test_double_backward_is_refused():
    query, key, value = leaves()
    first = torch.autograd.grad(call(query, key, value).square().sum(), query, create_graph=True)[
        0
    ]
    with pytest.raises(errors.UnsupportedError, match=r"double backward.*create_graph=False"):
        first.sum().backward()


# torch's own decompositions for forward mode are scripts.
@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_forward_mode_is_refused(backend):
    query, key, value = (tensor.detach() for tensor in leaves())
    with forward_ad.dual_level():
        call(query, key, value, backend)  # without a tangent nothing is lost
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(errors.UnsupportedError, match=r"forward-mode AD.*tangent"):
            call(dual, key, value, backend)
        with torch.no_grad(), pytest.raises(errors.UnsupportedError, match="forward-mode AD"):
            call(query, forward_ad.make_dual(key, torch.ones_like(key)), value, backend)


def test_results_repeat_bit_by_bit():
    tensors = leaves(seqlen=700, dtype=torch.bfloat16)
    first = gradients(tensors, "cpu")
    for _ in range(5):
        for one, other in zip(gradients(tensors, "cpu"), first, strict=True):
            assert torch.equal(one, other)


_PEAK = """
import resource, torch
from portattn import attention, masks
def run(seqlen):
    query, key, value = (torch.randn(1, 2, seqlen, 32).requires_grad_() for _ in range(3))
    attention(query, key, value, masks.longformer(128, 16)).square().mean().backward()
run(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run({seqlen})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_peak_memory_grows_with_the_length():
    def peak_kib(seqlen):
        code = _PEAK.format(seqlen=seqlen)
        return int(subprocess.check_output([sys.executable, "-c", code], text=True))

    # S x S scores of one head would be 1 GiB at 16384; all that is kept is some tens of tensors
    # of 4 MiB.
    assert peak_kib(16384) < 160 * 1024
