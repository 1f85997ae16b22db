"""The names by which Gluon of Triton 3.6 and of 3.9 differ, as one set for all other modules.

Nothing else may look at the version.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# TMA copies, global to shared memory (arriving at an mbarrier) and back.
if hasattr(tma, "async_load"):
    copy_in = tma.async_load
    copy_out = tma.async_store
else:
    copy_in = tma.async_copy_global_to_shared
    copy_out = tma.async_copy_shared_to_global
copy_out_wait = tma.store_wait


if hasattr(tma, "async_atomic_add"):
    add_out = tma.async_atomic_add
else:

    @gl._core.builtin
    def add_out(tensor_desc, coord, src, _semantic=None) -> None:  # noqa: ANN001, Triton has no types
        """TMA, shared to global memory, adding; Gluon of Triton 3.6 has it without a name."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


# Joins the threads of one partition; the compiler does not order a TMA store's end by itself.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

__all__ = [
    "GluonASTSource",
    "TensorDescriptor",
    "add_out",
    "barrier",
    "copy_in",
    "copy_out",
    "copy_out_wait",
    "fence_async_shared",
    "gl",
    "mbarrier",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
