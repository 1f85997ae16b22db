"""The asm statements of warpgroup matrix products, written for the shapes that a variant needs.

An asm statement lists every register of its accumulator, up to 128 of them, and the preprocessor
cannot count: so ptx_sm90.cuh declares the two products as templates and the text made here
specialises them. PTX ISA, "wgmma.mma_async".
"""

from __future__ import annotations

import functools

_DTYPES = {"bfloat16": ("bf16", "true"), "float16": ("f16", "false")}


def _registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"%{first + n}" for n in range(count)) + "}"


def _accumulator(tiles: int) -> str:
    return ", ".join(f'"+f"(d[{n}][{r}])' for n in range(tiles) for r in range(4))


def _from_shared(tiles: int, dtype: str) -> str:
    name, is_bfloat16 = _DTYPES[dtype]
    count = 4 * tiles
    return f"""
template <>
PA_DEVICE void wgmma_from_shared<{is_bfloat16}, {tiles}>(
    float (&d)[{tiles}][4], uint64 a, uint64 b, bool accumulate) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{8 * tiles}k16.f32.{name}.{name} "
        "{_registers(0, count)}, %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}"
        : {_accumulator(tiles)}
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}}
"""


def _from_registers(tiles: int, dtype: str) -> str:
    name, is_bfloat16 = _DTYPES[dtype]
    count = 4 * tiles
    return f"""
template <>
PA_DEVICE void wgmma_from_registers<{is_bfloat16}, {tiles}>(float (&d)[{tiles}][4],
                                                            const uint32 (&a)[4], uint64 b) {{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n{8 * tiles}k16.f32.{name}.{name} "
        "{_registers(0, count)}, {_registers(count, 4)}, %{count + 4}, 1, 1, 1, 1;"
        : {_accumulator(tiles)}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""


@functools.cache
def header(block_k: int, head_dim_v: int, dtype: str) -> str:
    """wgmma.cuh for one variant: S = Q K^T of block_k columns, O += P V of head_dim_v columns.

    Args:
        block_k, head_dim_v: multiples of 8 up to 256.
        dtype: ``"float16"`` or ``"bfloat16"``.
    """
    return (
        "#pragma once\nnamespace portattn {\n"
        + _from_shared(block_k // 8, dtype)
        + _from_registers(head_dim_v // 8, dtype)
        + "}  // namespace portattn\n"
    )
