"""Decoding in raw CUDA for sm_80 and later: few query rows over long keys (see decode.cu).

Nothing is planned: a mask of one interval of keys per row becomes four numbers, and the device
divides the keys that each sequence has, so that neither a new token nor a new length costs a plan
or an upload. Not done: other masks, float32, gradients.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from portattn.backends.base import AttentionInputs, Config, ConfigValue, Kernel
from portattn.backends.cupy import config_decode as configs
from portattn.backends.cupy import loader
from portattn.backends.cupy.config_decode import DecodeConfig, DecodeVariant
from portattn.backends.cupy.device import device_properties, device_reasons
from portattn.backends.cupy.fast_launch import LaunchLike, device_launch
from portattn.backends.cupy.launch import DTYPE_NAMES, input_values, is_aligned
from portattn.backends.cupy.params import pack, pointer
from portattn.backends.repeated import arrival_counters, call_key, current_device, current_stream
from portattn.backends.scalar_mask import ScalarMask, scalar_mask

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from portattn.problem import AttentionProblem

_HEADER = "decode_params.cuh"
_MAX_LENGTH = 2**31 - 2**20  # key indices are int32, and strips reach past the end
_MAX_STRIPS = 2**31 - 1
_MAX_ROWS = 64  # without kv_lengths; the forward kernels read K and V no more often from there on
_MAX_CALLS = 1024
_POINTERS = struct.Struct("=12Q")  # the struct's first fields


class CupyDecode(Kernel):
    """Few query rows of sequences whose lengths only the device knows: Ampere, Ada and later."""

    name: ClassVar[str] = "cupy_decode"
    backend: ClassVar[str] = "cupy"
    config_type: ClassVar[type[Config]] = DecodeConfig

    def __init__(self) -> None:
        self._calls: dict[Hashable, _DecodeCall] = {}

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

    def run(self, inputs: AttentionInputs, config: Config) -> None:
        """See `Kernel.run`."""
        if inputs.output.numel() == 0:
            return
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

    def _prepare(self, inputs: AttentionInputs, config: DecodeConfig) -> _DecodeCall:
        query, key, value = inputs.query, inputs.key, inputs.value
        rows = query.shape[1] // key.shape[1] * query.shape[2]
        terms = inputs.softcap != 0, inputs.alibi_slopes is not None, inputs.bias is not None
        aligned = all(is_aligned(tensor) for tensor in (query, key, value, inputs.output))
        variant = configs.variant(
            DTYPE_NAMES[query.dtype], query.shape[3], value.shape[3], rows, aligned, terms, config
        )
        min_piece = config.min_rounds * configs.key_groups(rows, config)
        strips = _num_strips(query.shape[0], key.shape[1], rows, key.shape[2], config.block_k)
        most = config.blocks_per_sm * self._num_sms(inputs)
        workers = max(min(most, -(-strips // min_piece)), 1)
        values = _values(inputs, rows, variant.block_q)
        values |= {"min_piece": min_piece, "num_workers": workers}
        launch = self._make_launch(variant, query.device, [pack(values, _HEADER)])
        return _DecodeCall(launch, workers, variant.block_q, variant.head_dim_v)

    def _device_reasons(self, problem: AttentionProblem) -> list[str]:
        return device_reasons(problem, self._capability)

    def _capability(self, problem: AttentionProblem) -> tuple[int, int]:
        return device_properties(problem.device).capability

    def _num_sms(self, inputs: AttentionInputs) -> int:
        return device_properties(str(inputs.query.device)).num_sms

    def _make_launch(
        self, variant: DecodeVariant, device: torch.device, arguments: Sequence[bytes]
    ) -> LaunchLike:
        import cupy

        cupy.cuda.runtime.setDevice(device.index)  # CuPy keeps the current device per thread
        major, minor = device_properties(str(device)).capability
        shared = variant.shared_bytes()
        program = variant.program(f"sm_{major}{minor}")
        function = loader.load_function(program, device.index, shared)
        threads = 32 * variant.config.num_warps
        return device_launch(function, arguments, threads, shared, device.index, self.name)


class _DecodeCall:
    """One kind of call: its launch, and what it needs beside the inputs. Thread-safe."""

    def __init__(self, launch: LaunchLike, workers: int, block_q: int, head_dim_v: int) -> None:
        """Workspace: two pieces of block_q rows per worker, and a counter.

        Args:
            launch: the kernel with its argument.
            workers: blocks of the grid.
            block_q, head_dim_v: of the variant.
        """
        self._launch, self._workers = launch, workers
        self._lse_offset = 4 * 2 * workers * block_q * head_dim_v
        self._floats = 2 * workers * block_q * (head_dim_v + 1)

    def run(self, inputs: AttentionInputs) -> None:
        """Launch on the inputs' device, which is the current one, and current stream."""
        device, workers, launch = inputs.query.device, self._workers, self._launch
        counters = arrival_counters(device, workers)
        pieces = torch.empty(self._floats, dtype=torch.float32, device=device)
        start = pieces.data_ptr()
        stream = current_stream(device.index) if device.type == "cuda" else 0
        with launch.lock:
            _POINTERS.pack_into(
                launch.memory,
                launch.offsets[0],
                inputs.query.data_ptr(),
                inputs.key.data_ptr(),
                inputs.value.data_ptr(),
                inputs.output.data_ptr(),
                pointer(inputs.lse),
                pointer(inputs.kv_lengths),
                pointer(inputs.alibi_slopes),
                pointer(inputs.bias),
                pointer(inputs.sinks),
                start,
                start + self._lse_offset,
                counters.data_ptr(),
            )
            launch.launch(workers, stream)


def _num_strips(batch: int, num_kv_heads: int, rows: int, seqlen_k: int, block_k: int) -> int:
    """Most strips that a call can have."""
    row_blocks = -(-rows // configs.block_q(rows))
    return batch * num_kv_heads * row_blocks * max(-(-seqlen_k // block_k), 1)


def _values(inputs: AttentionInputs, rows: int, block_q: int) -> dict[str, int | float]:
    """Fields of the kernel's argument; those that change from call to call are overwritten."""
    mask = ScalarMask() if inputs.mask is None else scalar_mask(inputs.mask.program)
    if mask is None:
        raise AssertionError("unsupported_reasons refuses other masks")
    lengths = inputs.kv_lengths
    return input_values(inputs) | {
        "kv_lengths": 0,
        "piece_output": 0,
        "piece_lse": 0,
        "counters": 0,
        "num_kv_heads": inputs.key.shape[1],
        "row_blocks": -(-rows // block_q),
        # Lengths fit int32: of an int64 the low word is enough.
        "length_stride": 2 if lengths is not None and lengths.dtype == torch.int64 else 1,
        "mask_lo": mask.lo,
        "mask_hi": mask.hi,
        "mask_begin": mask.key_begin,
        "mask_end": mask.key_end,
    }
