"""What a GPU gives one program: shared memory, registers, descriptors; known without the GPU."""

from __future__ import annotations

import dataclasses
import functools

REGISTERS_PER_SM = 65536
SHARED_RESERVED_BYTES = 1024  # per block, by the CUDA driver

# Shared memory per block (opt-in) and per multiprocessor, bytes: CUDA C Programming Guide, table
# "Technical specifications per compute capability".
_NVIDIA_SHARED = {
    80: (166912, 167936),
    86: (101376, 102400),
    87: (166912, 167936),
    89: (101376, 102400),
    90: (232448, 233472),
    100: (232448, 233472),
    103: (232448, 233472),
    110: (232448, 233472),
    120: (101376, 102400),
    121: (101376, 102400),
}
# Local data share per workgroup and per compute unit, bytes: AMD CDNA and RDNA ISA documents.
_AMD_SHARED = {"gfx950": (163840, 163840)}
_AMD_SHARED_DEFAULT = (65536, 65536)


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceLimits:
    """Limits of one architecture.

    Attributes:
        arch: ``"sm_90"``, ``"gfx942"``, ...
        shared_bytes: most shared memory one program may use.
        shared_bytes_per_sm: of a multiprocessor or compute unit.
        num_sms: multiprocessors or compute units.
    """

    arch: str
    shared_bytes: int
    shared_bytes_per_sm: int
    num_sms: int

    @property
    def is_amd(self) -> bool:
        """A ROCm device."""
        return self.arch.startswith("gfx")

    @property
    def capability(self) -> int:
        """NVIDIA compute capability times ten; 0 for AMD."""
        return 0 if self.is_amd else int(self.arch.removeprefix("sm_"))

    @property
    def has_tma(self) -> bool:
        """Tensor descriptors are read by the copy engine (Hopper and later)."""
        return self.capability >= 90

    @property
    def has_wgmma(self) -> bool:
        """Matrix operands come from shared memory (Hopper, data-centre Blackwell)."""
        return 90 <= self.capability < 120


def limits_of(arch: str, num_sms: int = 132) -> DeviceLimits:
    """The table's entry for an architecture; an unknown one gets the smallest of its vendor."""
    if arch.startswith("gfx"):
        shared = _AMD_SHARED.get(arch, _AMD_SHARED_DEFAULT)
    else:
        shared = _NVIDIA_SHARED.get(int(arch.removeprefix("sm_")), (101376, 102400))
    return DeviceLimits(arch, *shared, num_sms)


@functools.cache
def device_limits(device: str) -> DeviceLimits:
    """The limits of a torch device, e.g. ``"cuda:0"``; shared memory as its driver reports it.

    A function of the device only: hosts do not change GPUs under a running process.
    """
    import torch

    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    table = limits_of(arch, properties.multi_processor_count)
    reported = getattr(properties, "shared_memory_per_block_optin", 0)
    if reported > 0 and not table.is_amd:
        return dataclasses.replace(table, shared_bytes=reported)
    return table


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, n >= 1."""
    return 1 << (n - 1).bit_length()


@dataclasses.dataclass(frozen=True, slots=True)
class Footprint:
    """What one program of the forward takes.

    Attributes:
        shared_bytes: shared memory.
        accumulators: float32 registers per thread held by the output and the scores.
    """

    shared_bytes: int
    accumulators: int


def forward_footprint(
    *,
    block_q: int,
    block_k: int,
    head_dim: int,
    head_dim_v: int,
    element_bytes: int,
    num_warps: int,
    num_stages: int,
    partial_stages: int,
    bias: bool,
    split_float32: bool,
    limits: DeviceLimits,
) -> Footprint:
    """A model, slightly above what the compiler allocates; tests hold it against compiled kernels.

    wgmma reads query, key and value tiles from shared memory: one query tile and num_stages pairs
    of key and value tiles. mma.sync keeps the query in registers and one buffer less for one of
    the two. The epilogue turns the output's layout through shared memory that the loops no longer
    need.
    """
    block_d = max(16, next_power_of_2(head_dim))
    block_dv = max(16, next_power_of_2(head_dim_v))
    query_bytes = block_q * block_d * element_bytes
    key_bytes = block_k * block_d * element_bytes
    value_bytes = block_k * block_dv * element_bytes
    wave = 64 if limits.is_amd else 32
    accumulators = block_q * (block_dv + block_k) // (wave * num_warps)
    scores_bytes = block_q * block_k * element_bytes
    fewer_stages = max(num_stages - 1, 1)
    if limits.is_amd:
        # gfx950 copies to shared memory asynchronously and keeps every stage; others keep one less
        # there.
        stages = num_stages if limits.arch == "gfx950" else fewer_stages
        pairs = key_bytes + value_bytes if num_stages > 1 else max(key_bytes, value_bytes)
        loops = stages * pairs + scores_bytes * (2 if limits.arch == "gfx950" else 1)
    elif element_bytes == 4:
        loops = query_bytes + num_stages * key_bytes + fewer_stages * value_bytes + scores_bytes
        if split_float32:  # each operand as two tf32 numbers
            loops = max(loops, 2 * num_stages * (key_bytes + value_bytes))
    elif limits.has_wgmma:
        pairs = num_stages * (key_bytes + value_bytes)
        loops = query_bytes + pairs
        loops += 1024 if limits.capability >= 100 else 64  # barriers; tensor memory's are more
        if partial_stages == num_stages:
            loops += block_q * block_k // 8 + 1024  # beside a stage less the bits find room
    else:
        loops = num_stages * key_bytes + fewer_stages * value_bytes + scores_bytes + 1024
    if bias:
        # The tile changes its layout on the way to the scores.
        loops += block_q * block_k * 4 + 1536
    epilogue = block_q * block_dv * 4
    if not limits.is_amd:
        epilogue += block_q * block_dv // 4 + 1024  # rows are padded against bank conflicts
    return Footprint(max(loops, query_bytes, epilogue), accumulators)
