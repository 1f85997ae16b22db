"""The host side of the Triton decode: configs, refusals, programs, variants; and that it compiles.

No GPU is needed; what the kernel computes is tested in the interpreter.
"""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from portattn import masks
from portattn.backends.triton import decode, decode_launch
from portattn.backends.triton.aot import example_inputs
from portattn.backends.triton.decode import TritonDecode
from portattn.backends.triton.decode_config import TritonDecodeConfig, default_for, infeasible
from portattn.backends.triton.decode_kernel import RUNTIME_PARAMETERS, decode_kernel
from portattn.backends.triton.limits import limits_of
from portattn.problem import AttentionProblem
from tests.triton.compile_decode_target import CASES

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950")
# Stack or scratch bytes of a thread, with the pinned Triton. ptxas keeps a few scalars of the
# prologue there where that lets one more program run; AMD's with all score terms, at 64 rows.
MOST_SPILLED = {"sm": 64, "gf": 128}
# What every run compiles; the rest is slow.
QUICK = {"sm_80": ["d128"], "sm_90": ["d128", "rich_d64"], "gfx942": ["d128"]}


def problem(**changes):
    fields = {
        "device_type": "cuda", "dtype": "bfloat16", "batch": 4, "num_heads": 32,
        "num_kv_heads": 8, "seqlen_q": 1, "seqlen_k": 4096, "head_dim": 128, "head_dim_v": 128,
        "features": frozenset({"kv_lengths"}), "device": "cuda:0",
    }  # fmt: skip
    return AttentionProblem(**fields | changes)


@pytest.fixture
def reasons(monkeypatch):
    """Refusals where a GPU would be."""
    monkeypatch.setattr(decode, "device_reasons", lambda problem: [])
    return lambda **changes: "; ".join(TritonDecode().unsupported_reasons(problem(**changes)))


def test_refusals(reasons):
    assert reasons() == ""
    assert reasons(program=masks.streaming_llm(4, 50).program) == ""
    assert "joined by &" in reasons(program=masks.longformer(16, 3).program)
    assert reasons(seqlen_q=500) == ""
    assert reasons(seqlen_q=16, features=frozenset()) == ""
    assert "forward kernel is faster" in reasons(seqlen_q=17, features=frozenset())


@pytest.mark.parametrize("arch", ARCHS)
def test_defaults_are_feasible(arch):
    limits = limits_of(arch)
    sizes = itertools.product(
        ("float16", "bfloat16", "float32"), (1, 40, 64, 96, 128, 256), (1, 4, 32), (1, 5, 700)
    )
    for dtype, head_dim, num_heads, seqlen_q in sizes:
        case = problem(
            dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, num_heads=num_heads,
            num_kv_heads=1, seqlen_q=seqlen_q,
            features=frozenset({"kv_lengths", "bias", "alibi"}),
        )  # fmt: skip
        config = default_for(case, limits)
        assert infeasible(case, config, limits) == [], (case, config)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (TritonDecodeConfig(block_q=8), "block_q"),
        (TritonDecodeConfig(block_k=48), "block_k"),
        (TritonDecodeConfig(pieces_per_sm=0), "pieces_per_sm"),
        (TritonDecodeConfig(min_piece=0), "min_piece"),
        (TritonDecodeConfig(precision="tf32"), "precision"),
        (TritonDecodeConfig(precision="tf32x3"), "float32"),
        (TritonDecodeConfig(block_k=256, num_stages=5), "shared memory"),
        (TritonDecodeConfig(block_q=128, block_k=128), "accumulators"),
    ],
)
def test_impossible_configs(config, word):
    assert word in "; ".join(infeasible(problem(), config, limits_of("sm_90")))


def integers_of(case, config, mask=None):
    inputs = example_inputs(case, "cpu")
    object.__setattr__(inputs, "mask", mask)
    geometry = decode_launch.geometry_of(inputs, config)
    values = dict(
        zip(RUNTIME_PARAMETERS[-len(geometry.integers) :], geometry.integers, strict=True)
    )
    return geometry, values


def test_there_are_programs_for_all_pieces():
    draw = random.Random(3)
    for _ in range(300):
        batch, seqlen_k = draw.randint(1, 40), draw.randint(1, 900)
        config = TritonDecodeConfig(
            block_k=16, pieces_per_sm=draw.randint(1, 90), min_piece=draw.randint(1, 4)
        )
        case = problem(batch=batch, seqlen_k=seqlen_k, num_heads=2, num_kv_heads=1, head_dim=1)
        _, values = integers_of(case, config)
        # As the kernel plans them.
        tiles = [
            -(-draw.choice((0, seqlen_k, draw.randint(0, seqlen_k))) // 16) for _ in range(batch)
        ]
        piece = max(-(-sum(tiles) // values["target_pieces"]), config.min_piece)
        pieces = [max(1, -(-n // piece)) for n in tiles]
        assert sum(pieces) <= values["max_pieces"]
        assert sum(n for n in pieces if n > 1) <= values["group_slots"]


def test_windows_need_few_programs():
    config = TritonDecodeConfig(pieces_per_sm=64)
    case = problem(batch=2, seqlen_k=100_000, num_heads=1, num_kv_heads=1, head_dim=1)
    _, values = integers_of(case, config, masks.sliding_window(256))
    assert values["max_pieces"] <= 2 * 3


def test_sequences_that_are_not_cut_need_no_workspace():
    # A long prefill has more blocks of rows than there are pieces to make.
    case = problem(batch=8, seqlen_q=500, seqlen_k=600, head_dim=1, head_dim_v=1)
    geometry, values = integers_of(case, TritonDecodeConfig(pieces_per_sm=64))
    assert (geometry.workspace, values["max_pieces"], values["target_pieces"]) == (0, 8, 1)
    # Cut ones take less than two slots for each piece that was aimed at.
    geometry, values = integers_of(problem(batch=8), TritonDecodeConfig(pieces_per_sm=64))
    assert geometry.workspace <= 2 * 64 * values["slot_rows"] * 129


def variants(case, config):
    """The compiler's keys of a call's launches, as the launcher on an H100 would compute them."""
    found = []

    class Recorder:
        def __getitem__(self, grid):
            bind = create_function_from_signature(
                decode_kernel.signature,
                decode_kernel.params,
                make_backend(GPUTarget("cuda", 90, 32)),
            )

            def record(*args, **options):
                _, specialization, rest = bind(*args, **options)
                found.append(f"{specialization} {rest}")

            return record

    inputs = example_inputs(case, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_launch.decode_kernel, "decode_kernel", Recorder())
        decode_launch.DecodeCall(inputs, config).run(inputs)
    return found


def test_lengths_do_not_recompile():
    keys = set()
    lengths = (1, 2, 15, 16, 17, 64, 100, 128, 500, 1000, 1024)
    for seqlen_k, batch, kv_heads in itertools.product(lengths, (1, 2, 16, 300), (1, 2)):
        case = problem(
            batch=batch, seqlen_k=seqlen_k, num_heads=4 * kv_heads, num_kv_heads=kv_heads,
            head_dim=16, head_dim_v=16,
        )  # fmt: skip
        keys.update(variants(case, TritonDecodeConfig()))
    # Up to 32 sequences, or more.
    assert len(keys) == 2
    for seqlen_q in (1, 2, 3, 4, 5, 17, 100, 111):
        case = problem(seqlen_q=seqlen_q, seqlen_k=200, head_dim=16, head_dim_v=16)
        keys.update(variants(case, TritonDecodeConfig()))
    # Merging is compiled for 4, 8 or 16 rows at a time.
    assert len(keys) == 4


def compiled(arch, cases, repository, cache):
    """What compile_decode_target.py prints, from a process with a compiler cache of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(repository)}
    script = Path(__file__).parent / "compile_decode_target.py"
    result = subprocess.run(
        [sys.executable, str(script), arch, *cases],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def check_compiled(arch, cases, repository, cache):
    for case, made in compiled(arch, cases, repository, cache).items():
        name = f"{arch} {case}: {made}"
        assert made["infeasible"] == [], name
        assert made["shared_bytes"] <= made["limit_bytes"], name
        # The model that prunes configs must not promise less than the compiler takes.
        assert made["shared_bytes"] <= made["model_bytes"], name
        assert made["spill_bytes"] <= MOST_SPILLED[arch[:2]], name
        if arch.startswith("sm_"):
            assert made["copies"] == ["cp.async.cg"], name
            assert made["counter_is_acquire_release"], name


@pytest.mark.parametrize("arch", QUICK)
def test_default_kernels_compile(arch, repository, tmp_path):
    check_compiled(arch, QUICK[arch], repository, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_all_kernels_compile(arch, repository, tmp_path):

    check_compiled(arch, list(CASES), repository, tmp_path)
