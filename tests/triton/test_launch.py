"""The host side of the Triton forward's launches: alignment, descriptors, counters, variants."""

import itertools

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from portattn import masks
from portattn.backends.triton import geometry, launch
from portattn.backends.triton.aot import example_inputs
from portattn.backends.triton.config import TritonForwardConfig
from portattn.backends.triton.forward_kernel import forward_kernel
from portattn.plan import plan_mask
from portattn.problem import AttentionProblem


def test_rows_of_16_bytes():
    tensor = torch.empty(2, 3, 50, 64, dtype=torch.bfloat16)
    assert geometry.vector_elements((tensor,)) == 8
    assert geometry.vector_elements((tensor.float(),)) == 4
    assert geometry.vector_elements((tensor, tensor.transpose(1, 2))) == 8
    assert geometry.vector_elements((tensor, tensor[..., 1:])) == 1
    assert geometry.vector_elements((torch.empty(2, 3, 50, 20, dtype=torch.float16),)) == 1
    # A stride that is never walked does not matter.
    assert geometry.vector_elements((torch.empty(2, 3, 50, 60)[:, :, :1],)) == 4


def test_descriptors_are_per_head():
    tensor = torch.empty(2, 50, 3, 64, dtype=torch.bfloat16).transpose(1, 2)
    sizes, strides = geometry.descriptor_layout(tensor, 8)
    assert sizes == [2, 3, 50, 64]
    assert strides == [50 * 3 * 64, 64, 3 * 64, 1]


def test_no_descriptor_where_the_copy_engine_cannot_read():
    tensor = torch.empty(2, 3, 50, 64, dtype=torch.bfloat16)
    assert geometry.descriptor_layout(tensor, 1) is None
    assert geometry.descriptor_layout(tensor[:1].expand(2, -1, -1, -1), 8) is None
    assert geometry.descriptor_layout(tensor[:, :, :0], 8) is None
    assert geometry.descriptor_layout(tensor[:1, :, :1], 8)[1] == [9600, 3200, 9600, 1]


def variants(problem, mask, config):
    """The compiler's keys of a call's launches, as the launcher on an H100 would compute them."""
    found = []

    class Recorder:
        def __getitem__(self, grid):
            backend = make_backend(GPUTarget("cuda", 90, 32))
            bind = create_function_from_signature(
                forward_kernel.signature, forward_kernel.params, backend
            )

            def record(*args, **options):
                _, specialization, rest = bind(*args, **options)
                found.append(f"{specialization} {rest}")

            return record

    sizes = {
        "batch": problem.batch,
        "num_heads": problem.num_heads,
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
    }
    plan = plan_mask(mask, **sizes, q_offset=0, block_q=config.block_q, block_k=config.block_k)
    schedule = plan.schedule(
        batch=problem.batch, num_heads=problem.num_heads, workers=132, head_dim_v=64
    )
    # Tensors on the CPU, without data: the key does not depend on what they hold.
    inputs = example_inputs(problem, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "forward_kernel", Recorder())
        launch.launch_forward(inputs, plan, schedule, config)
    return found


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.longformer(32, 4)])
@pytest.mark.parametrize("tma", [False, True])
def test_lengths_do_not_recompile(mask, tma):
    config = TritonForwardConfig(64, 64, 4, 3, 2, tma)
    keys = set()
    lengths = (1, 2, 15, 16, 17, 64, 100, 128, 500, 1000, 1024)
    for seqlen, (batch, heads) in itertools.product(lengths, ((1, 1), (2, 8), (3, 5))):
        problem = AttentionProblem(
            "cuda", "float16", batch, heads, heads, seqlen, seqlen, 64, 64,
            features=frozenset({"lse"}),
        )  # fmt: skip
        keys.update(variants(problem, mask, config))
    # With rows cut or whole: the two variants that the schedule chooses between.
    assert len(keys) <= 2


def test_passes_have_a_closed_list_of_variants():
    config = TritonForwardConfig(64, 64, 4, 3, 2, True)
    keys = set()
    for seqlen in (100, 333, 512, 700, 1024):
        for stride in (8, 24, 60):
            problem = AttentionProblem("cuda", "float16", 1, 2, 2, seqlen, seqlen, 64, 64)
            keys.update(variants(problem, masks.sparse_transformer_strided(stride), config))
    # First pass or last, stepped keys or not, rows cut or whole.
    assert len(keys) <= 8


@pytest.mark.parametrize(
    "masks_of",
    [
        lambda new: masks.causal(),
        lambda new: masks.sliding_window(300 if new else 200),
        lambda new: masks.longformer(200 if new else 64, 40 if new else 3),
        lambda new: masks.bigbird(32, 2, 3, 1, seed=int(new)),
        lambda new: masks.sparse_transformer_strided(24 if new else 8),
        lambda new: masks.sparse_transformer_fixed(100 if new else 64),
        lambda new: (
            masks.causal() & (masks.local(63, 0) | masks.KeyModulo(96 if new else 80, 0, 1))
        ),
        lambda new: masks.documents([0, 90, 333, 2000] if new else [0, 100, 2000]),
        lambda new: masks.documents([0, 90, 333, 2000] if new else [0, 50, 2000]) & masks.causal(),
    ],
)
def test_a_new_mask_of_a_known_form_compiles_nothing(masks_of):
    config = TritonForwardConfig(64, 64, 4, 3, 2, True)

    def keys(new, lengths):
        return {
            key
            for seqlen in lengths
            for key in variants(
                AttentionProblem("cuda", "float16", 1, 2, 2, seqlen, seqlen, 64, 64),
                masks_of(new),
                config,
            )
        }

    # Short enough for whole rows, long enough for cut ones.
    known = keys(False, (150, 1024))
    assert keys(True, (130, 700, 1111, 1900)) <= known
