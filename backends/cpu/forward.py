"""The main CPU kernel (csrc/forward.hpp): flash attention with query rows in the vector lanes.

    S^T = K Q^T;  m' = max(m, max S);  P = exp2(S - m');  O^T := O^T exp2(m - m') + V^T P^T

(Dao et al., FlashAttention, 2022, algorithm 1, transposed: maxima and sums run down the lanes,
never across.) Takes every plan, dtype and score term; a few query rows leave lanes idle: `decode`.
Its backward is `backward`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, cast

from portattn.backends.base import AttentionGradients, AttentionInputs, Config, ConfigValue, Kernel
from portattn.backends.cpu import abi, backward, prepared
from portattn.backends.cpu.sources import source_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portattn.problem import AttentionProblem

_FEW_ITEMS = 16  # rows of tiles, over all heads, below which threads would wait for each other


@dataclasses.dataclass(frozen=True, slots=True)
class CpuForwardConfig(Config):
    """How the main CPU kernel runs.

    Attributes:
        block_q: query rows of a tile; a multiple of the panel (`abi.panel`).
        block_k: keys of a tile.
        pack: how keys and values are copied first: ``"none"``; ``"rows"``, float32 tiles to
            padded rows (no set conflicts at head_dim 128); ``"tiles"``, all of them to bf16 tiles
            for AMX; ``"auto"``, tiles where AMX pays, else none.
        head_group: heads whose items are ordered together, longest first.
    """

    block_q: int = 64
    block_k: int = 64
    pack: str = "auto"
    head_group: int = 1


class CpuForward(Kernel):
    """Any problem on a CPU."""

    name: ClassVar[str] = "cpu_forward"
    backend: ClassVar[str] = "cpu"
    config_type: ClassVar[type[Config]] = CpuForwardConfig
    has_backward: ClassVar[bool] = True

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Other devices, and dtypes or head sizes that attention() does not take either."""
        return device_reasons(problem)

    def default_config(self, problem: AttentionProblem) -> Config:
        """Large tiles for dense and causal masks, small ones for others and for few items."""
        panel = abi.panel()
        sparse = not _is_dense_or_causal(problem.program)
        rows = panel * max(1, (64 if sparse else 128) // panel)
        heads = problem.batch * problem.num_heads
        while rows > panel and heads * -(-problem.seqlen_q // rows) < _FEW_ITEMS:
            rows = max(panel, rows // 2 // panel * panel)
        return CpuForwardConfig(block_q=rows, block_k=128 if abi.has_amx() and not sparse else 64)

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """Tile sizes, packing and the order of heads (measured worth: 0 to 5 %.

        15 % at head_dim 128).
        """
        return {
            "block_q": (32, 64, 96, 128, 192, 256),
            "block_k": (32, 64, 96, 128, 256),
            "pack": self._packs(problem),
            "head_group": (1, 4, 16) if problem.batch * problem.num_heads > 1 else (1,),
        }

    def _packs(self, problem: AttentionProblem) -> tuple[str, ...]:
        if abi.has_amx() and problem.seqlen_q > abi.panel():
            return ("none", "tiles") if problem.dtype == "float32" else ("tiles",)
        return ("none", "rows") if problem.dtype == "float32" else ("none",)

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """block_q in whole panels, positive sizes within the planner's limit."""
        config = cast("CpuForwardConfig", config)
        reasons = []
        panel = abi.panel()
        if config.block_q < 1 or config.block_q % panel or config.block_q > 4096:
            reasons.append(
                f"block_q is {config.block_q}; on {abi.isa()} it must be a multiple of {panel} "
                "up to 4096"
            )
        if not 1 <= config.block_k <= 4096:
            reasons.append(f"block_k is {config.block_k}; it must be in 1..4096")
        if config.pack not in abi.PACK or (config.pack == "tiles" and not abi.has_amx()):
            allowed = [name for name in abi.PACK if name != "tiles" or abi.has_amx()]
            reasons.append(f"pack is {config.pack!r}; on {abi.isa()} it must be one of {allowed}")
        if config.head_group < 1:
            reasons.append(f"head_group is {config.head_group}; it must be >= 1")
        return reasons

    def run(self, inputs: AttentionInputs, config: Config) -> None:
        """See `Kernel.run`."""
        prepared.run(inputs, config, _settings)

    def backward(
        self, inputs: AttentionInputs, gradients: AttentionGradients, config: Config
    ) -> None:
        """See `Kernel.backward`. Its tiles are its own: the config is the forward's."""
        backward.run(inputs, gradients, backward.default_tiles(inputs))

    def source_files(self) -> Sequence[str]:
        """This module and the C++ of the kernel."""
        return source_files(__file__)


def _is_dense_or_causal(program: tuple[int, ...]) -> bool:
    """Whether the mask's program is one that visits at least half of all tiles: ALL.

    Or BAND without a lower bound.
    """
    return len(program) < 3 or (program[1] == 1 and len(program) == 4 and program[2] <= -(2**62))


def _settings(config: Config) -> prepared.Settings:
    config = cast("CpuForwardConfig", config)
    return prepared.Settings(
        kernel=abi.KERNEL_MAIN,
        block_q=config.block_q,
        block_k=config.block_k,
        min_piece=8,
        head_group=config.head_group,
        pack=config.pack,
        group_heads=False,
    )


def device_reasons(problem: AttentionProblem) -> list[str]:
    """Reasons that hold for both CPU kernels."""
    reasons = []
    if problem.device_type != "cpu":
        reasons.append(f"the tensors are on {problem.device_type}; this kernel runs on the CPU")
    if problem.dtype not in ("float32", "float16", "bfloat16"):
        reasons.append(f"dtype is {problem.dtype}; allowed are float32, float16 and bfloat16")
    if not 1 <= problem.head_dim <= 256 or not 1 <= problem.head_dim_v <= 256:
        reasons.append(
            f"head_dim is {problem.head_dim} and head_dim_v {problem.head_dim_v}; "
            "both must be in 1..256"
        )
    return reasons
