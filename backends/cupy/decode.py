"""Decoding in raw CUDA for sm_80 and later: few query rows over long keys (see decode.cu).

Nothing is planned: a mask of one interval of keys per row becomes four numbers, and the device
divides the keys that each sequence has, so that neither a new token nor a new length costs a plan
or an upload. Not done: other masks, float32, gradients.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from portattn.backends.base import AttentionInputs, Config, ConfigValue, Kernel
from portattn.backends.cuda_launch import Launch, Launches
from portattn.backends.cupy import config_decode as configs
from portattn.backends.cupy import loader
from portattn.backends.cupy.config_decode import DecodeConfig, DecodeVariant
from portattn.backends.cupy.device import device_properties, device_reasons
from portattn.backends.cupy.fast_launch import FIELDS, device_launch, field_patches
from portattn.backends.cupy.launch import DTYPE_NAMES, input_values, is_aligned
from portattn.backends.cupy.params import pack
from portattn.backends.repeated import (
    KV_LENGTHS,
    NUM_SOURCES,
    RepeatedCall,
    call_key,
    current_device,
)
from portattn.backends.scalar_mask import ScalarMask, scalar_mask

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from portattn.problem import AttentionProblem

_HEADER = "decode_params.cuh"
_MAX_LENGTH = 2**31 - 2**20  # key indices are int32, and strips reach past the end
_MAX_STRIPS = 2**31 - 2**16  # and a share more fits int32
_MAX_ROWS = 64  # without kv_lengths; the forward kernels read K and V no more often from there on
_MAX_CALLS = 1024


class CupyDecode(Kernel):
    """Few query rows of sequences whose lengths only the device knows: Ampere, Ada and later."""

    name: ClassVar[str] = "cupy_decode"
    backend: ClassVar[str] = "cupy"
    config_type: ClassVar[type[Config]] = DecodeConfig

    def __init__(self) -> None:
        self._calls: dict[Hashable, RepeatedCall] = {}

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """See `Kernel.unsupported_reasons`."""
        reasons = self._device_reasons(problem)
        if problem.dtype not in configs.DTYPES:
            reasons.append(f"dtype is {problem.dtype}; it must be one of {configs.DTYPES}")
        if max(problem.head_dim, problem.head_dim_v) > 256:
            reasons.append(
                f"head_dim is {problem.head_dim} and head_dim_v {problem.head_dim_v}; both must "
                "be at most 256"
            )
        if scalar_mask(problem.program) is None:
            reasons.append("the mask is more than bands and key ranges joined by &")
        rows = configs.num_rows(problem)
        if "kv_lengths" not in problem.features and rows > _MAX_ROWS:
            reasons.append(
                f"seqlen_q times query heads per KV head is {rows}; above {_MAX_ROWS} the forward "
                "kernels are faster"
            )
        if max(rows, problem.seqlen_k) > _MAX_LENGTH:
            reasons.append(
                "seqlen_k, and seqlen_q times query heads per KV head, must be at most "
                f"{_MAX_LENGTH}"
            )
        elif _num_strips(problem.batch, problem.num_kv_heads, rows, problem.seqlen_k, 16) > (
            _MAX_STRIPS
        ):
            reasons.append(
                "batch, KV heads and lengths multiply to more than 2**31 strips of 16 keys"
            )
        return reasons

    def default_config(self, problem: AttentionProblem) -> Config:
        """See `Kernel.default_config`."""
        return configs.default_config(problem, self._capability(problem))

    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """See `Kernel.search_space`."""
        return {
            "block_k": configs.BLOCKS_K,
            "num_warps": configs.WARPS,
            "num_stages": configs.STAGES,
            "blocks_per_sm": configs.BLOCKS_PER_SM,
            "min_rounds": configs.MIN_ROUNDS,
        }

    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """See `Kernel.infeasible_reasons`."""
        return configs.infeasible_reasons(
            problem, cast("DecodeConfig", config), self._capability(problem)
        )

    def source_files(self) -> Sequence[str]:
        """The CUDA sources, and what lays out their launches."""
        names = ("decode.cu", *configs.HEADERS, "decode.py", "config_decode.py", "launch.py")
        return [str(loader.SOURCE_DIR / name) for name in names]

    def run(self, inputs: AttentionInputs, config: Config) -> RepeatedCall | None:
        """See `Kernel.run`."""
        if inputs.output.numel() == 0:
            return None
        lengths = inputs.kv_lengths
        key = (
            call_key(self, inputs, config),
            None if inputs.mask is None else inputs.mask.program,
            None if lengths is None else lengths.dtype,
        )
        with current_device(inputs.query.device):
            call = self._calls.get(key)
            if call is None:
                call = self._prepare(inputs, cast("DecodeConfig", config))
                if len(self._calls) >= _MAX_CALLS:
                    self._calls.clear()
                self._calls[key] = call
            call.run(inputs)
        return call

    def _prepare(self, inputs: AttentionInputs, config: DecodeConfig) -> RepeatedCall:
        query, key, value = inputs.query, inputs.key, inputs.value
        rows = query.shape[1] // key.shape[1] * query.shape[2]
        terms = inputs.softcap != 0, inputs.alibi_slopes is not None, inputs.bias is not None
        # The query is read in pairs of elements.
        aligned = query.shape[3] % 2 == 0 and all(
            is_aligned(tensor) for tensor in (query, key, value, inputs.output)
        )
        variant = configs.variant(
            DTYPE_NAMES[query.dtype], query.shape[3], value.shape[3], rows, aligned, terms, config
        )
        min_piece = config.min_rounds * configs.key_groups(rows, config)
        num_rows = _num_rows(query.shape[0], key.shape[1], rows)
        strips = _num_strips(query.shape[0], key.shape[1], rows, key.shape[2], config.block_k)
        most = config.blocks_per_sm * self._num_sms(inputs)
        workers = even_workers(num_rows, max(min(most, -(-strips // min_piece)), 1))
        values = _values(inputs, rows, variant.block_q)
        values |= {"min_piece": min_piece, "num_workers": workers}
        launch = self._make_launch(variant, query.device, [pack(values, _HEADER)])
        # Two pieces for each worker: outputs, then LSEs.
        pieces = 2 * workers * variant.block_q
        starts = {"piece_output": 0, "piece_lse": 4 * pieces * variant.head_dim_v}
        patches = field_patches({**FIELDS, "kv_lengths": KV_LENGTHS}, starts, _HEADER)
        launch = dataclasses.replace(launch, grid=workers, patches=patches)
        return RepeatedCall(
            Launches([launch], num_sources=NUM_SOURCES, device_index=query.device.index or 0),
            query.device,
            scratch_floats=pieces * (variant.head_dim_v + 1),
            num_counters=workers,
        )

    def _device_reasons(self, problem: AttentionProblem) -> list[str]:
        return device_reasons(problem, self._capability)

    def _capability(self, problem: AttentionProblem) -> tuple[int, int]:
        return device_properties(problem.device).capability

    def _num_sms(self, inputs: AttentionInputs) -> int:
        return device_properties(str(inputs.query.device)).num_sms

    def _make_launch(
        self, variant: DecodeVariant, device: torch.device, arguments: Sequence[bytes]
    ) -> Launch:
        import cupy

        cupy.cuda.runtime.setDevice(device.index)  # CuPy keeps the current device per thread
        major, minor = device_properties(str(device)).capability
        shared = variant.shared_bytes()
        program = variant.program(f"sm_{major}{minor}")
        function = loader.load_function(program, device.index, shared)
        threads = 32 * variant.config.num_warps
        return device_launch(function, arguments, threads, shared, self.name)


def _num_rows(batch: int, num_kv_heads: int, rows: int) -> int:
    """Rows of work: blocks of query rows of every KV head."""
    return batch * num_kv_heads * -(-rows // configs.block_q(rows))


def _num_strips(batch: int, num_kv_heads: int, rows: int, seqlen_k: int, block_k: int) -> int:
    """Most strips that a call can have."""
    return _num_rows(batch, num_kv_heads, rows) * max(-(-seqlen_k // block_k), 1)


def even_workers(num_rows: int, most: int) -> int:
    """Blocks to launch: where sequences are equally long, shares that end with rows need no merge.

    A tenth of the SMs may idle for it: fewer of them read at the same rate
    (docs/decisions/0007-decode-divides-on-the-device.md).

    Args:
        num_rows: rows of work: batch times KV heads times blocks of query rows.
        most: blocks that fit the device and find enough keys.
    """
    for workers in range(most, most - most // 10 - 1, -1):
        if workers > 0 and (num_rows % workers == 0 or workers % num_rows == 0):
            return workers
    return most


def _reciprocal(divisor: int) -> tuple[int, int]:
    """(magic, shift): n // divisor is 2 * n * (magic + 2**32) >> 32 + shift for 0 <= n < 2**31.

    Granlund and Montgomery 1994, theorem 4.2: magic + 2**32 is between 2**31 and 2**32.
    """
    shift = (divisor - 1).bit_length()
    return -(-(1 << (31 + shift)) // divisor) - 2**32, shift


def _values(inputs: AttentionInputs, rows: int, block_q: int) -> dict[str, int | float]:
    """Fields of the kernel's argument; those that change from call to call are overwritten."""
    mask = ScalarMask() if inputs.mask is None else scalar_mask(inputs.mask.program)
    if mask is None:
        raise AssertionError("unsupported_reasons refuses other masks")
    lengths = inputs.kv_lengths
    row_blocks = -(-rows // block_q)
    group_magic, group_shift = _reciprocal(inputs.query.shape[1] // inputs.key.shape[1])
    row_blocks_magic, row_blocks_shift = _reciprocal(row_blocks)
    return input_values(inputs) | {
        "kv_lengths": 0,
        "piece_output": 0,
        "piece_lse": 0,
        "counters": 0,
        "num_kv_heads": inputs.key.shape[1],
        "row_blocks": row_blocks,
        "group_magic": group_magic,
        "group_shift": group_shift,
        "row_blocks_magic": row_blocks_magic,
        "row_blocks_shift": row_blocks_shift,
        # Lengths fit int32: of an int64 the low word is enough.
        "length_stride": 2 if lengths is not None and lengths.dtype == torch.int64 else 1,
        "mask_lo": mask.lo,
        "mask_hi": mask.hi,
        "mask_begin": mask.key_begin,
        "mask_end": mask.key_end,
    }
