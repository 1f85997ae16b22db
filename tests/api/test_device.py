"""DeviceKey: what identifies a device, and what does not."""

import dataclasses

import pytest
import torch

from portattn import device
from portattn.device import DeviceKey, device_key


def test_this_cpu():
    key = device_key("cpu")
    assert key.kind == "cpu"
    assert key.threads == torch.get_num_threads()
    assert key.cores >= 1
    assert key.family == f"cpu-{key.arch}"
    assert key.arch.startswith(("x86_64-v", "aarch64", "arm64"))
    assert device_key(torch.device("cpu")) is key


def test_fingerprint_is_of_what_decides_speed():
    key = DeviceKey("cuda", "nvidia", "H100", "sm_90", 132, memory_bytes=80 << 30)
    assert len(key.fingerprint) == 64
    for change in ({"name": "H100 SXM"}, {"memory_bytes": 1}):
        assert dataclasses.replace(key, **change).fingerprint == key.fingerprint
    for change in ({"cores": 114}, {"arch": "sm_80"}, {"threads": 2}, {"isa": ("fma",)}):
        assert dataclasses.replace(key, **change).fingerprint != key.fingerprint


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ({"sse4_2"}, "x86_64-v2"),
        ({"avx2", "fma", "f16c", "bmi2"}, "x86_64-v3"),
        ({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, "x86_64-v4"),
    ],
)
def test_x86_levels(flags, level):
    assert device._x86_level(flags) == level


@pytest.mark.parametrize(
    ("hip", "kind", "arch"), [(None, "cuda", "sm_90"), ("6.4", "hip", "gfx942")]
)
def test_gpus(monkeypatch, hip, kind, arch):
    class Properties:
        name, major, minor, gcnArchName = "a GPU", 9, 0, "gfx942:sramecc+:xnack-"  # noqa: N815
        multi_processor_count, shared_memory_per_block_optin, regs_per_multiprocessor = (
            132,
            232448,
            65536,
        )
        L2_cache_size, total_memory = 50 << 20, 80 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    device._gpu_key.cache_clear()
    key = device_key("cuda:0")
    device._gpu_key.cache_clear()
    assert (key.kind, key.arch, key.cores, key.shared_memory_bytes) == (kind, arch, 132, 232448)
    assert key.family == f"{kind}-{arch}"
