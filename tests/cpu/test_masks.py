"""Every kind of tile and item: random masks, presets, cut rows, passes, ids, full lists.

Each against the mask's own predicate, in float64.
"""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from portattn import masks
from portattn.backends.cpu.decode import CpuDecode, CpuDecodeConfig
from portattn.backends.cpu.forward import CpuForward, CpuForwardConfig
from tests.cpu.cases import DTYPES, INF, Case, available_isas
from tests.presets import PRESETS
from tests.strategies import mask_expressions


@hypothesis.settings(max_examples=40)
@hypothesis.given(case=mask_expressions(), seed=st.integers(0, 1000))
def test_random_masks(case, seed):
    """Random expressions on random lengths and tiles: output, LSE and empty rows."""
    torch.manual_seed(seed)
    call = Case.random(
        case.batch,
        case.num_heads,
        1,
        case.seqlen_q,
        case.seqlen_k,
        9,
        mask=case.mask,
        q_offset=case.q_offset,
    )
    block_q, block_k = 32 * (1 + seed % 4), (16, 33, 64, 100)[seed // 4 % 4]
    call.check(
        CpuForward(), CpuForwardConfig(block_q, block_k, ("auto", "rows")[seed % 2], 1 + seed % 3)
    )
    if case.seqlen_q <= 16:
        call.check(CpuDecode(), CpuDecodeConfig(block_k, 1))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets(preset):
    """Every preset, longer than several tiles."""
    case = Case.random(preset.batch, preset.num_heads, 1, 300, head_dim=16, mask=preset.mask)
    case.check(CpuForward(), CpuForwardConfig(64, 32))
    rows = Case.random(preset.batch, preset.num_heads, 1, 3, 300, 16, mask=preset.mask)
    rows.check(CpuDecode(), CpuDecodeConfig(32, 1))


KINDS = {
    "bits": masks.sliding_window(37),
    "steps": masks.dilated(60, 3),
    "passes": masks.sparse_transformer_strided(7),
    "list of full tiles": masks.bigbird(16, 2, 3, 1, seed=3),
    "empty rows": masks.QueryRange(10, 20) & masks.causal(),
    "rows empty in one pass only": masks.Band(-3, 0)
    | (masks.DiffModulo(5, 0, 1) & masks.QueryRange(100, None)),
    "ids": masks.documents([0, 3, 3, 70, 90, 256]) & masks.causal(),
    "ids without a band": masks.documents([0, 3, 100, 256]),
    "by head": masks.per_head([masks.causal(), masks.local(4, 9)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", KINDS.values(), ids=KINDS.keys())
def test_kinds_of_tiles(isa, mask, dtype):
    """Each instruction set on each kind of tile."""
    Case.random(1, 2, 2, 256, head_dim=20, dtype=dtype, mask=mask).check(
        CpuForward(), CpuForwardConfig(64, 32)
    )
    rows = Case.random(1, 2, 2, 7, 256, 20, dtype=dtype, mask=mask)
    rows.check(CpuDecode(), CpuDecodeConfig(32, 1))


@pytest.fixture
def threads(request):
    """Torch's thread count, which the kernels take theirs from, set for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mask", [None, masks.causal(), KINDS["passes"], KINDS["rows empty in one pass only"]]
)
def test_cut_rows(threads, dtype, mask):
    """Rows cut into pieces for many threads, with sinks, merged by the last piece.

    The same as uncut.
    """
    case = Case.random(
        1,
        2,
        1,
        9,
        700,
        24,
        dtype=dtype,
        mask=mask,
        sinks=torch.tensor([0.3, -1.0]),
        alibi_slopes=torch.rand(2),
    )
    decode = CpuDecodeConfig(block_k=16, min_piece=1)
    threads(1)
    _whole, whole_lse = case.check(CpuForward(), CpuForwardConfig(32, 16))
    threads(8)
    cut, cut_lse = case.check(CpuForward(), CpuForwardConfig(32, 16))
    case.check(CpuDecode(), decode)
    torch.testing.assert_close(cut_lse, whole_lse)
    again, again_lse = case.run(CpuForward(), CpuForwardConfig(32, 16))
    assert torch.equal(again, cut)
    assert torch.equal(again_lse, cut_lse)


def test_cut_rows_are_cut(threads):
    """The case above does exercise the merge: its schedule has slots."""
    from portattn.plan import plan_mask

    plan = plan_mask(
        None, batch=1, num_heads=2, seqlen_q=9, seqlen_k=700, q_offset=691, block_q=32, block_k=16
    )
    schedule = plan.schedule(batch=1, num_heads=2, workers=8, head_dim_v=24, min_piece=8)
    assert schedule.num_slots > 0


def test_empty_row_in_every_piece(threads):
    """A row that keeps nothing in a cut tile stays 0 and -inf."""
    threads(8)
    case = Case.random(1, 1, 1, 4, 2000, 8, mask=masks.QueryRange(1997, None))
    for kernel, config in (
        (CpuForward(), CpuForwardConfig(32, 16)),
        (CpuDecode(), CpuDecodeConfig(16, 1)),
    ):
        output, lse = case.check(kernel, config)
        assert (output[0, 0, 0] == 0).all()
        assert lse[0, 0, 0] == -INF


def test_isas():
    """The best instruction set of this machine is in the list, and an absent one is refused."""
    from portattn.backends.cpu import abi

    assert abi.isa() == available_isas()[-1]
    assert abi.functions().portattn_cpu_select_isa(b"x86-64-v9") == -1
