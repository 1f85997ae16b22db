"""ctypes mirror of csrc/cpu.h."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint32, c_void_p
from typing import ClassVar

from portattn import native
from portattn.errors import ConfigError

KERNEL_MAIN, KERNEL_DECODE = 0, 1


class CpuArgs(ctypes.Structure):
    """pa_cpu_args: one call."""

    _fields_: ClassVar = [
        ("struct_size", c_uint32),
        ("abi_version", c_uint32),
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("output", c_void_p),
        ("lse", c_void_p),
        ("bias", c_void_p),
        ("alibi_slopes", c_void_p),
        ("sinks", c_void_p),
        ("query_strides", c_int64 * 3),
        ("key_strides", c_int64 * 3),
        ("value_strides", c_int64 * 3),
        ("output_strides", c_int64 * 3),
        ("lse_strides", c_int64 * 3),
        ("bias_strides", c_int64 * 4),
        ("alibi_strides", c_int64 * 2),
        ("batch", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("seqlen_q", c_int64),
        ("seqlen_k", c_int64),
        ("head_dim", c_int64),
        ("head_dim_v", c_int64),
        ("plan", c_void_p),
        ("schedule", c_void_p),
        ("dtype", c_int32),
        ("bias_dtype", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("kernel", c_int32),
        ("threads", c_int32),
        ("head_group", c_int32),
        ("pack", c_int32),
        ("group_heads", c_int32),
        ("plan_batch", c_int32),
    ]


class CpuBackwardArgs(ctypes.Structure):
    """pa_cpu_backward_args: one call."""

    _fields_: ClassVar = [
        ("struct_size", c_uint32),
        ("abi_version", c_uint32),
        *((name, c_void_p) for name in (
            "query", "key", "value", "output", "lse", "grad_output", "grad_lse", "bias",
            "alibi_slopes", "sinks", "grad_query", "grad_key", "grad_value", "grad_alibi_slopes",
            "grad_bias", "grad_sinks",
        )),
        *((f"{name}_strides", c_int64 * count) for name, count in (
            ("query", 3), ("key", 3), ("value", 3), ("output", 3), ("lse", 3), ("grad_output", 3),
            ("grad_lse", 3), ("bias", 4), ("alibi", 2), ("grad_query", 3), ("grad_key", 3),
            ("grad_value", 3), ("grad_alibi", 2), ("grad_bias", 4),
        )),
        *((name, c_int64) for name in (
            "batch", "num_heads", "num_kv_heads", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v",
        )),
        ("plan", c_void_p),
        ("dtype", c_int32),
        ("bias_dtype", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("threads", c_int32),
        ("pack", c_int32),
        ("plan_batch", c_int32),
        ("reserved", c_int32),
    ]  # fmt: skip


PACK = {"auto": 0, "none": 1, "rows": 2, "tiles": 3}  # PA_PACK_...


@functools.cache
def functions() -> ctypes.CDLL:
    """Libportattn with the signatures of the CPU kernels set."""
    lib = native.library()
    lib.portattn_cpu_forward.argtypes = (POINTER(CpuArgs), c_char_p, c_int64)
    lib.portattn_cpu_forward.restype = c_int32
    lib.portattn_cpu_backward.argtypes = (POINTER(CpuBackwardArgs), c_char_p, c_int64)
    lib.portattn_cpu_backward.restype = c_int32
    lib.portattn_cpu_isa.restype = c_char_p
    lib.portattn_cpu_panel.restype = c_int32
    lib.portattn_cpu_select_isa.argtypes = (c_char_p,)
    lib.portattn_cpu_select_isa.restype = c_int32
    lib.portattn_cpu_measure_fma.argtypes = (c_int32, c_double)
    lib.portattn_cpu_measure_fma.restype = c_double
    lib.portattn_cpu_measure_read.argtypes = (c_void_p, c_int64, c_int32, c_int32)
    lib.portattn_cpu_measure_read.restype = c_double
    return lib


def isa() -> str:
    """The instruction set in use, e.g. ``"x86-64-v3"``: the CPU's best, or ``PORTATTN_CPU_ISA``.

    Raises:
        ConfigError: ``PORTATTN_CPU_ISA`` names one that this CPU or build does not have.
    """
    name: bytes = functions().portattn_cpu_isa()
    if not name:
        import os

        raise ConfigError(
            f"PORTATTN_CPU_ISA is {os.environ.get('PORTATTN_CPU_ISA')!r}, which this CPU or this "
            "build does not have; allowed are x86-64-v2, x86-64-v3, x86-64-v4, x86-64-v4+amx (as "
            "far as the CPU goes) or neon on aarch64. Unset it to take the best one"
        )
    return name.decode()


def panel() -> int:
    """Query rows that sit in one panel of vector registers.

    Block_q of the main kernel is a multiple.
    """
    isa()
    return int(functions().portattn_cpu_panel())


def has_amx() -> bool:
    """Whether the instruction set in use multiplies bf16 tiles."""
    return isa().endswith("+amx")
