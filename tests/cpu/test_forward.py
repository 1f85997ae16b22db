"""Both kernels against dense masked softmax in float64: every shape, dtype and feature.

Small cases run on each instruction set of this machine.
"""

import pytest
import torch

from portattn import masks
from portattn.backends.cpu import abi
from portattn.backends.cpu.decode import CpuDecode, CpuDecodeConfig
from portattn.backends.cpu.forward import CpuForward, CpuForwardConfig
from tests.cpu.cases import DTYPES, INF, Case

SHAPES = [
    (1, 1, 1, 1),
    (17, 33, 7, 5),
    (70, 70, 64, 64),
    (100, 333, 128, 96),
    (5, 300, 1, 256),
    (33, 5, 80, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "head_dim", "head_dim_v"), SHAPES)
def test_shapes(isa, dtype, seqlen_q, seqlen_k, head_dim, head_dim_v):
    """Odd lengths and head sizes, Dv != D."""
    case = Case.random(1, 2, 2, seqlen_q, seqlen_k, head_dim, head_dim_v, dtype)
    case.check()
    if seqlen_q <= 16:
        case.check(CpuDecode())


@pytest.mark.parametrize(
    "head_dim", [1, 2, 3, 11, 12, 13, 15, 16, 17, 31, 100, 127, 128, 129, 192, 255, 256]
)
def test_head_dims(kernel, head_dim):
    """Remainders of every micro-kernel."""
    for dims in ((head_dim, 40), (40, head_dim)):
        Case.random(1, 2, 1, 16, 90, *dims, mask=masks.causal()).check(kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (6, 2), (10, 2)])
def test_gqa(kernel, dtype, heads, kv_heads):
    """Heads of a group share keys and values.

    Group sizes that fill a micro-kernel and that do not.
    """
    for seqlen_q in (1, 3):
        Case.random(2, heads, kv_heads, seqlen_q, 130, 40, dtype=dtype, mask=masks.causal()).check(
            kernel
        )


TERMS = {
    "softcap": {"softcap": 3.0},
    "small softcap": {"softcap": 0.25, "scale": 4.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.03125])},
    "alibi by batch": {"alibi_slopes": torch.tensor([[0.5, 0.1], [0.0, 0.25]])},
    "scale 0": {"scale": 0.0},
    "negative scale": {"scale": -0.7},
    "sinks": {"sinks": torch.tensor([0.5, -2.0])},
    "sinks at infinity": {"sinks": torch.tensor([-INF, 60.0])},
    "all": {
        "softcap": 5.0,
        "alibi_slopes": torch.tensor([0.5, 0.03125]),
        "sinks": torch.tensor([1.0, 0.0]),
    },
}


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_score_terms(isa, kernel, terms):
    """Score terms, with a mask so that full and partial tiles have them."""
    case = Case.random(2, 2, 2, 8, 200, 32, mask=masks.sliding_window(150), **terms)
    case.check(kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 2, 8, 200), (1, 2, 8, 200), (2, 1, 1, 200), (1, 1, 8, 1), (1, 1, 1, 1)]
)
def test_bias(isa, kernel, dtype, shape):
    """Bias in the query's dtype and in float32, broadcast in every dimension.

    With -inf and finfo.min.
    """
    bias = torch.randn(shape)
    bias[torch.rand(shape) < 0.2] = -INF
    if bias.numel() > 1:
        bias.view(-1)[0] = torch.finfo(torch.float16).min
    for bias_dtype in {dtype, torch.float32}:
        case = Case.random(
            2, 2, 2, 8, 200, 32, dtype=dtype, mask=masks.causal(), bias=bias.to(bias_dtype)
        )
        case.check(kernel)


def test_lowest_bias_is_finite(kernel):
    """A row whose every bias is finfo.min has uniform weights; -inf alone empties a row.

    In one piece: pieces of a cut row merge by an LSE that cannot tell their sizes apart at that
    magnitude.
    """
    case = Case.random(1, 1, 1, 2, 40, 16, scale=0.0)
    case.bias = torch.full((1, 1, 2, 40), torch.finfo(torch.float32).min)
    case.bias[0, 0, 1] = -INF
    output, lse = case.run(kernel)
    torch.testing.assert_close(output[0, 0, 0], case.value[0, 0].mean(0))
    assert torch.equal(output[0, 0, 1], torch.zeros(16))
    assert lse[0, 0, 1] == -INF


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(kernel, dtype):
    """bshd tensors, sliced rows and an expanded batch are read in place."""
    case = Case.random(2, 2, 2, 6, 90, 24, dtype=dtype, mask=masks.causal())
    case.query = torch.randn(2, 6, 2, 48).to(dtype)[..., :24].transpose(1, 2)
    case.key = torch.randn(2, 180, 2, 24).to(dtype)[:, ::2].transpose(1, 2)
    case.value = torch.randn(1, 2, 90, 24).to(dtype).expand(2, 2, 90, 24)
    case.check(kernel)


def test_output_strides(kernel):
    """Output and LSE are written through their strides, and nothing beside them."""
    case = Case.random(1, 2, 2, 6, 90, 24)
    expected, _ = case.run(kernel)
    base = torch.full((1, 6, 2, 32), 7.0)
    target = base[..., 4:28].transpose(1, 2)
    from portattn.backends.base import AttentionInputs

    inputs = AttentionInputs(
        case.query,
        case.key,
        case.value,
        target,
        None,
        None,
        84,
        None,
        case.scaled(),
        0.0,
        None,
        None,
        None,
        False,
    )
    kernel.run(inputs, kernel.config_type())
    torch.testing.assert_close(target, expected)
    assert (base[..., :4] == 7).all()
    assert (base[..., 28:] == 7).all()


@pytest.mark.parametrize("value", [float("nan"), INF])
def test_non_finite_keys_reach_their_rows(isa, kernel, value):
    """A NaN or inf at a key that a row may attend to reaches it.

    Causal rows before its tile stay clean.
    """
    case = Case.random(1, 1, 1, 8, 200, 16, mask=masks.causal(), q_offset=150)
    clean, _ = case.run(kernel)
    for tensor in (case.key, case.value):
        saved = tensor[0, 0, 153].clone()
        tensor[0, 0, 153, 3] = value
        output, _lse = case.run(kernel)
        touched = output[0, 0, 3:].isfinite().all(-1)
        assert not touched.any() if tensor is case.value or value != value else not touched.all()
        tensor[0, 0, 153] = saved
    assert clean.isfinite().all()


def test_keys_past_kv_lengths_reach_nothing(kernel):
    """Keys that do not exist are never read: not even NaN gets through."""
    case = Case.random(
        3, 2, 1, 4, 100, 16, kv_lengths=torch.tensor([100, 37, 0]), mask=masks.causal()
    )
    case.key[1, :, 37:] = float("nan")
    case.value[1, :, 37:] = float("nan")
    case.key[2] = float("nan")
    output, lse = case.run(kernel)
    assert output.isfinite().all()
    assert (lse[2] == -INF).all()
    case.check(kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_lengths(kernel, dtype):
    """Each batch has its own length and positions, with masks and score terms by batch."""
    mask = masks.per_batch([masks.causal(), masks.sliding_window(9), masks.All()])
    case = Case.random(
        3,
        4,
        2,
        2,
        150,
        24,
        dtype=dtype,
        kv_lengths=torch.tensor([150, 64, 1]),
        mask=mask,
        alibi_slopes=torch.rand(3, 4),
        bias=torch.randn(3, 1, 2, 150),
        sinks=torch.randn(4),
    )
    case.check(kernel)


@pytest.mark.parametrize("shape", [(0, 2, 5, 9), (1, 2, 0, 9), (1, 2, 5, 0)])
def test_empty(kernel, shape):
    """No batch, no rows: an empty result. No keys: zeros and -inf."""
    batch, heads, seqlen_q, seqlen_k = shape
    output, lse = Case.random(batch, heads, heads, seqlen_q, seqlen_k, 16, q_offset=0).run(kernel)
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(lse, torch.full_like(lse, -INF))


@pytest.mark.parametrize(
    "config", [CpuForwardConfig(96, 40, "rows", 3), CpuForwardConfig(256, 256, "none", 100)]
)
def test_configs(config):
    """Tiles larger than the sequence, packing, head groups that do not divide the heads."""
    Case.random(3, 4, 2, 130, head_dim=48, mask=masks.longformer(20, 5)).check(
        CpuForward(), config
    )


def test_infeasible_configs(problem):
    """Block sizes that do not fit the panel or the planner are named with what is allowed."""
    reasons = CpuForward().infeasible_reasons(problem, CpuForwardConfig(8, 0, "some", 0))
    assert len(reasons) == 4
    assert f"multiple of {abi.panel()}" in reasons[0]
    assert "1..4096" in reasons[1]
    assert "none" in reasons[2]
    assert CpuDecode().infeasible_reasons(problem, CpuDecodeConfig(0, 0))
    for kernel in (CpuForward(), CpuDecode()):
        assert not kernel.infeasible_reasons(problem, kernel.default_config(problem))
        space = kernel.search_space(problem)
        assert set(space) == set(kernel.default_config(problem).to_dict())


def test_unsupported(problem):
    """Decode refuses what the main kernel is faster for; both refuse other devices and sizes."""
    import dataclasses

    assert not CpuForward().unsupported_reasons(problem)
    assert "cpu_forward is faster" in CpuDecode().unsupported_reasons(problem)[0]
    wrong = dataclasses.replace(problem, device_type="cuda", dtype="float64", head_dim=257)
    assert len(CpuForward().unsupported_reasons(wrong)) == 3


@pytest.fixture
def problem():
    """A problem for the main kernel."""
    from portattn.problem import AttentionProblem

    return AttentionProblem("cpu", "float32", 1, 8, 2, 512, 512, 64, 64)
