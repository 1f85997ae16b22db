"""The CPU kernel for few query rows (csrc/decode.hpp): lanes over head_dim.

Bound by reading keys and values once, so a long sequence is cut into pieces for all threads by the
schedule (Dao et al., Flash-Decoding, 2023). Takes every plan, dtype and score term; refuses
problems with more query rows than it is faster for: the main kernel fills its panels with rows of
one head, so half a panel is the limit for any number of heads (measured: 16 to 24 rows with
AVX-512, 8 to 12 with AVX2).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, cast

from portattn.backends.base import AttentionInputs, Config, ConfigValue, Kernel
from portattn.backends.cpu import abi, prepared
from portattn.backends.cpu.forward import device_reasons
from portattn.backends.cpu.sources import source_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.problem import AttentionProblem

_BLOCK_Q = 16  # at least half of every panel


@dataclasses.dataclass(frozen=True, slots=True)
class CpuDecodeConfig(Config):
    """How the decode kernel runs.

    Attributes:
        block_k: keys of a tile.
        min_piece: tiles below which a row is not cut for more threads.
    """

    block_k: int = 256
    min_piece: int = 2


class CpuDecode(Kernel):
    """Query rows that would fill at most half a panel of the main kernel."""

    name: ClassVar[str] = "cpu_decode"
    backend: ClassVar[str] = "cpu"
    config_type: ClassVar[type[Config]] = CpuDecodeConfig

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Too many rows, or what no CPU kernel takes."""
        reasons = device_reasons(problem)
        if problem.device_type == "cpu" and problem.seqlen_q > abi.panel() // 2:
            reasons.append(
                f"seqlen_q is {problem.seqlen_q}; above {abi.panel() // 2} cpu_forward is faster"
            )
        return reasons

    def default_config(self, problem: AttentionProblem) -> Config:
        """256 keys a tile."""
        return CpuDecodeConfig()

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """Keys of a tile, and how small pieces may be."""
        return {"block_k": (128, 256, 512, 1024), "min_piece": (1, 2, 8)}

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """Positive sizes within the planner's limit."""
        config = cast("CpuDecodeConfig", config)
        reasons = []
        if not 1 <= config.block_k <= 4096:
            reasons.append(f"block_k is {config.block_k}; it must be in 1..4096")
        if config.min_piece < 1:
            reasons.append(f"min_piece is {config.min_piece}; it must be >= 1")
        return reasons

    def run(self, inputs: AttentionInputs, config: Config) -> None:
        """See `Kernel.run`."""
        prepared.run(inputs, config, _settings)

    def source_files(self) -> Sequence[str]:
        """This module and the C++ of the kernel."""
        return source_files(__file__)


def _settings(config: Config) -> prepared.Settings:
    config = cast("CpuDecodeConfig", config)
    return prepared.Settings(
        kernel=abi.KERNEL_DECODE,
        block_q=_BLOCK_Q,
        block_k=config.block_k,
        min_piece=config.min_piece,
        head_group=1,
        pack="none",
        group_heads=True,
    )
