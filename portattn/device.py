"""What the hardware is: the device half of the tuning key."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform

import torch

# CPU flags that a kernel's speed depends on, by the names that /proc/cpuinfo gives them.
_CPU_FLAGS = frozenset(
    (
        *("sse4_2", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16"),
        *("amx_bf16", "asimd", "asimdhp", "bf16", "sve"),
    )
)


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceKey:
    """One device as the tuning database knows it.

    Sizes are 0 where they do not apply or are unknown.

    Attributes:
        kind: ``"cpu"``, ``"cuda"`` or ``"hip"``.
        vendor: ``"nvidia"``, ``"amd"``, or the CPU's vendor string.
        name: product name; for people, not matched on.
        arch: ``"sm_90"``, ``"gfx942"``, ``"x86_64-v3"``, ``"aarch64"``.
        cores: streaming multiprocessors or compute units; physical cores of a CPU.
        threads: threads that torch uses on a CPU; 0 on a GPU.
        shared_memory_bytes: most shared memory that one block may have.
        registers: 32-bit registers of one multiprocessor.
        l2_bytes: level-2 cache of a GPU, of one core on a CPU.
        l3_bytes: level-3 cache of a CPU.
        memory_bytes: memory of a GPU.
        isa: sorted CPU instruction-set flags that kernels depend on.
    """

    kind: str
    vendor: str
    name: str
    arch: str
    cores: int
    threads: int = 0
    shared_memory_bytes: int = 0
    registers: int = 0
    l2_bytes: int = 0
    l3_bytes: int = 0
    memory_bytes: int = 0
    isa: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """Devices of a family run each other's configs: ``"cuda-sm_90"``, ``"cpu-x86_64-v3"``."""
        return f"{self.kind}-{self.arch}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides speed; the name and the memory's size do not."""
        fields = dataclasses.asdict(self)
        del fields["name"], fields["memory_bytes"]
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def device_key(device: torch.device | str) -> DeviceKey:
    """The key of a torch device; a CPU's holds the number of threads that torch uses now.

    Args:
        device: a CPU or CUDA (ROCm too) device; ``"cuda"`` is the current one.

    Raises:
        ValueError: another device type.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu_key(torch.get_num_threads())
    if device.type == "cuda":
        return _gpu_key(torch.cuda.current_device() if device.index is None else device.index)
    raise ValueError(f"device is {str(device)!r}; a DeviceKey exists for 'cpu' and 'cuda' devices")


@functools.lru_cache(maxsize=64)
def _gpu_key(index: int) -> DeviceKey:
    properties = torch.cuda.get_device_properties(index)
    is_hip = torch.version.hip is not None
    arch = (
        properties.gcnArchName.split(":")[0]
        if is_hip
        else f"sm_{properties.major}{properties.minor}"
    )
    return DeviceKey(
        kind="hip" if is_hip else "cuda",
        vendor="amd" if is_hip else "nvidia",
        name=properties.name,
        arch=arch,
        cores=properties.multi_processor_count,
        shared_memory_bytes=getattr(properties, "shared_memory_per_block_optin", 0),
        registers=getattr(properties, "regs_per_multiprocessor", 0),
        l2_bytes=getattr(properties, "L2_cache_size", 0),
        memory_bytes=properties.total_memory,
    )


@functools.lru_cache(maxsize=64)
def _cpu_key(threads: int) -> DeviceKey:
    fields = _cpuinfo()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    machine = platform.machine()
    return DeviceKey(
        kind="cpu",
        vendor=fields.get("vendor_id", fields.get("CPU implementer", "unknown")),
        name=fields.get("model name", platform.processor() or machine),
        arch=_x86_level(flags) if machine in ("x86_64", "AMD64") else machine,
        cores=_physical_cores(),
        threads=threads,
        l2_bytes=_cache_bytes(2),
        l3_bytes=_cache_bytes(3),
        isa=tuple(sorted(flags.intersection(_CPU_FLAGS))),
    )


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor; empty where there is no /proc (macOS)."""
    path = pathlib.Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(errors="replace").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _x86_level(flags: set[str]) -> str:
    """The x86-64 psABI micro-architecture level: the CPU kernels are compiled once for each."""
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return "x86_64-v4"
    if {"avx2", "fma", "f16c", "bmi2"} <= flags:
        return "x86_64-v3"
    return "x86_64-v2"


def _physical_cores() -> int:
    """Cores that this process may use, two threads of one core counted once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if usable is None:
        return os.cpu_count() or 1
    cores = set()
    for cpu in usable:
        topology = pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(topology.read_text().strip() if topology.exists() else str(cpu))
    return len(cores)


def _cache_bytes(level: int) -> int:
    """Size of cpu0's data or unified cache of a level; 0 if the system does not say."""
    for index in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "level").read_text().strip() != str(level):
            continue
        if (index / "type").read_text().strip() == "Instruction":
            continue
        size = (index / "size").read_text().strip()
        units = {"K": 1024, "M": 1024**2, "G": 1024**3}
        return int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)
    return 0
