"""The sm_90a kernel without a GPU: its defaults, what fits, what ptxas says of its variants."""

import dataclasses
import pathlib
import struct

import pytest
import torch

from portattn import masks
from portattn.backends.cupy import config_sm90 as configs
from portattn.backends.cupy.config_sm90 import ForwardSm90Config
from portattn.backends.cupy.forward_sm90 import CupyForwardSm90
from portattn.backends.cupy.loader import compile_program
from portattn.problem import AttentionProblem

NO_TERMS = (False, False, False)
ALL_TERMS = (True, True, True)
MASKS = {
    "dense": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(1024),
    "longformer": masks.longformer(512, 64),
    "bigbird": masks.bigbird(64, 3, 3, 2, 0),
    "strided": masks.sparse_transformer_strided(128),
}


def problem(head_dim, head_dim_v=None, mask=None, seqlen=16384, **changes):
    made = AttentionProblem(
        "cuda", "bfloat16", 1, 16, 16, seqlen, seqlen, head_dim, head_dim_v or head_dim,
        () if mask is None else mask.program, 0, frozenset(), "cuda:0",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("head_dim", [1, 40, 64, 72, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("name", MASKS)
def test_the_default_fits(name, head_dim):
    for head_dim_v in (head_dim, 64, 256):
        asked = problem(head_dim, head_dim_v, MASKS[name])
        config = configs.default_config(asked)
        assert configs.infeasible_reasons(asked, config) == []


def test_scattered_tiles_get_small_blocks_and_long_rows_large_ones():
    long = configs.default_config(problem(128, mask=MASKS["window"]))
    short = configs.default_config(problem(128, mask=MASKS["strided"]))
    blocks = masks.block_sparse(torch.ones(128, 128, dtype=torch.bool), 128)
    assert long.block_q == configs.default_config(problem(128, mask=blocks)).block_q == 128
    assert (short.block_q, short.blocks_per_sm) == (64, 2)


def test_heads_that_run_together_fit_the_cache():
    assert configs.default_config(problem(128, mask=MASKS["bigbird"])).head_group == 4
    far = configs.default_config(problem(128, mask=MASKS["bigbird"], seqlen=1 << 20))
    assert far.head_group == 1
    documents = masks.documents(torch.tensor([0, 30000, 65536])) & masks.causal()
    packed = configs.default_config(problem(128, mask=documents, seqlen=65536))
    assert packed.head_group == 4


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"consumers": 4}, "consumers"),
        ({"num_stages": 1}, "num_stages"),
        ({"block_k": 72}, "block_k"),
        ({"block_k": 48}, "block_k"),
        ({"block_k": 272}, "block_k"),
        ({"head_group": 0}, "head_group"),
        ({"consumers": 1, "ping_pong": True}, "ping_pong"),
        ({"num_stages": 4, "block_k": 128}, "shared memory"),
        ({"consumers": 3, "block_k": 192}, "registers"),
    ],
)
def test_what_does_not_fit_is_named(changes, word):
    config = dataclasses.replace(ForwardSm90Config(), **changes)
    assert any(word in reason for reason in configs.infeasible_reasons(problem(128), config))


def test_the_search_space_holds_what_fits():
    kernel = CupyForwardSm90()
    space = kernel.search_space(problem(128))
    default = kernel.default_config(problem(128))
    assert {
        name: value in space[name] for name, value in default.to_dict().items()
    } == dict.fromkeys(space, True)


def test_every_header_counts_for_the_identity():
    """Else a changed kernel would be taken for the one that was tuned."""
    variant = configs.variant(
        "bfloat16", 128, 128, True, NO_TERMS, False, False, ForwardSm90Config()
    )
    program = variant.program()
    names = {pathlib.Path(path).name for path in CupyForwardSm90().source_files()}
    assert {program.source, *program.headers} <= names


def test_masks_of_many_moduli_are_refused():
    mask = masks.KeyModulo(3, 0, 1)
    for modulus in (5, 7, 11, 13):
        mask = mask | masks.KeyModulo(modulus, 0, 1)
    reasons = CupyForwardSm90().unsupported_reasons(problem(128, mask=mask, device_type="cpu"))
    assert any("moduli" in reason for reason in reasons)


# (head_dim, head_dim_v, terms, stepped, config) -> most bytes of spill stores a thread, as ptxas
# of NVRTC 13.5 needed, none of them in a loop over full tiles.
CEILINGS = {
    (64, 64, NO_TERMS, False, ForwardSm90Config(3, 128, 2, ping_pong=True)): 640,
    (64, 64, NO_TERMS, True, ForwardSm90Config(1, 64, 2, blocks_per_sm=3)): 192,
    (128, 128, NO_TERMS, False, ForwardSm90Config(2, 128, 2, ping_pong=True)): 80,
    (128, 128, NO_TERMS, False, ForwardSm90Config(2, 176, 2)): 720,
    (128, 128, NO_TERMS, True, ForwardSm90Config(1, 64, 2, blocks_per_sm=2)): 16,
    (256, 256, NO_TERMS, False, ForwardSm90Config(2, 64, 2, ping_pong=True)): 48,
    (96, 192, NO_TERMS, False, ForwardSm90Config(2, 96, 2)): 48,
    (128, 128, ALL_TERMS, False, ForwardSm90Config(2, 64, 2)): 16,
}


def moves_to_uniform_registers(cubin):
    """R2UR instructions of a cubin's one kernel.

    There are few where ptxas knows that a warp's lanes all go the same way. Else it moves matrix
    descriptors from lanes' registers before each product: some 300 of them, and a tenth slower.
    """
    (sections,) = struct.unpack_from("<Q", cubin, 40)  # ELF64: e_shoff
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<II4Q", cubin, sections + size * n) for n in range(count)]
    (code,) = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin[headers[names][4] + name :].startswith(b".text.")
    ]
    opcodes = [code[n] | (code[n + 1] & 15) << 8 for n in range(0, len(code), 16)]
    return opcodes.count(0x2CA)


@pytest.mark.parametrize("target", CEILINGS, ids=str)
def test_variants_compile(target):
    head_dim, head_dim_v, terms, stepped, config = target
    variant = configs.variant(
        "bfloat16", head_dim, head_dim_v, True, terms, False, stepped, config
    )
    compiled = compile_program(variant.program())
    # C7508: setmaxnreg ignored; C7510, C7512, C7513: products one after the other; C7519: a
    # missing fence.
    assert "C75" not in compiled.log
    assert "warning" not in compiled.log.lower()
    assert compiled.resources().spill_store_bytes <= CEILINGS[target]
    assert moves_to_uniform_registers(compiled.cubin) <= 80
    assert variant.shared_bytes() <= configs.SHARED_LIMIT
