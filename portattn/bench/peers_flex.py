"""FlexAttention as a peer: compiled for the row, its block mask made before and not timed."""

from __future__ import annotations

import copyreg
import warnings
from typing import TYPE_CHECKING, Any

import torch

from portattn.bench import flex_blocks
from portattn.bench.contender import Contender
from portattn.bench.patterns import KINDS, document_ends, document_ids, documents_mod
from portattn.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn.attention.flex_attention import BlockMask

    from portattn.bench.data import Data
    from portattn.bench.patterns import MaskMod

BLOCK = 128  # FlexAttention's own default


def allow_many_compiles() -> None:
    """Lift Dynamo's limits: past them FlexAttention falls back to an unfused path; now it raises.

    Raises:
        ConfigError: this torch has no such settings.
    """
    from torch._dynamo import config

    wanted = {
        "recompile_limit": 1000,
        "accumulated_recompile_limit": 10000,
        "fail_on_recompile_limit_hit": True,
    }
    for name, value in wanted.items():
        if not hasattr(config, name):
            raise ConfigError(f"torch {torch.__version__} has no torch._dynamo.config.{name}")
        setattr(config, name, value)


def share_compiled() -> None:
    """Let Inductor's disk cache serve other processes than the one that filled it.

    Its keys are pickles, and torch's memory formats, which have no module, are pickled as members
    of whichever imported module comes first that holds torch: another one in a spawned process.
    """
    copyreg.pickle(torch.memory_format, _reduce_memory_format)


def _reduce_memory_format(value: torch.memory_format) -> tuple[Any, ...]:
    return _memory_format, (str(value).removeprefix("torch."),)


def _memory_format(name: str) -> torch.memory_format:
    found: torch.memory_format = getattr(torch, name)
    return found


def flex(data: Data, name: str, kernel_options: dict[str, Any] | None = None) -> Contender:
    """Compiled FlexAttention."""
    from torch.nn.attention.flex_attention import flex_attention

    allow_many_compiles()
    share_compiled()
    pattern = data.workload.pattern
    details: dict[str, Any] = {}
    if KINDS[pattern.kind].block != BLOCK:
        details["note"] = (
            f"block mask of {BLOCK}: FlexAttention fails with {KINDS[pattern.kind].block}"
        )
    block_mask = _block_mask(data)
    # One compiled function per contender; the caller resets Dynamo after the row.
    compiled = torch.compile(flex_attention, dynamic=False)
    options: dict[str, Any] = {"enable_gqa": data.is_grouped}
    if kernel_options is not None:
        options["kernel_options"] = kernel_options

    def call(blocks: BlockMask | None = block_mask) -> torch.Tensor:
        output: torch.Tensor = compiled(
            data.query, data.key, data.value, block_mask=blocks, **options
        )
        return output

    _quietly(call)
    fresh = _fresh(data, call) if pattern.is_documents else None
    return Contender(name, False, call, details=details, fresh=fresh)


def _quietly(compile_first: Callable[[], object]) -> None:
    """Without the compiler's own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile_first()


def _block_mask(data: Data) -> BlockMask | None:
    """The row's block mask, by the quickest way that gives what create_block_mask would."""
    from torch.nn.attention.flex_attention import create_block_mask

    workload = data.workload
    lengths = data.kv_lengths
    if workload.lengths == "random" and lengths is not None:
        return create_block_mask(
            lambda b, h, i, j: j < lengths[b], workload.batch, None, workload.seqlen_q,
            workload.seqlen_k, device=str(data.device), BLOCK_SIZE=BLOCK,
        )  # fmt: skip
    mask_mod = workload.pattern.mask_mod(workload.seqlen_k, data.device)
    if mask_mod is None:
        return None
    return flex_blocks.block_mask(
        mask_mod, workload.seqlen_q, workload.seqlen_k, data.device, BLOCK
    )


def _fresh(data: Data, call: Callable[[BlockMask], torch.Tensor]) -> Callable[[int], torch.Tensor]:
    """A new block mask by compiled create_block_mask, as its users make it, then the call.

    The ids change in place, so that nothing recompiles.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    pattern, length = data.workload.pattern, data.workload.seqlen_k
    ids = document_ids(document_ends(length, pattern.values[0], 0)).to(data.device)
    mask_mod: MaskMod = documents_mod(ids, pattern.kind == "causal_documents")
    compiled = torch.compile(create_block_mask, dynamic=False)
    is_compiled = False

    def create() -> BlockMask:
        blocks: BlockMask = compiled(
            mask_mod, None, None, length, length, device=str(data.device), BLOCK_SIZE=BLOCK
        )
        return blocks

    def fresh(seed: int) -> torch.Tensor:
        nonlocal is_compiled
        if not is_compiled:
            _quietly(create)
            is_compiled = True
        ids.copy_(document_ids(document_ends(length, pattern.values[0], seed)))
        return call(create())

    return fresh
