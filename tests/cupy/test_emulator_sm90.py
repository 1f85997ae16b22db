"""The emulator of ptx_sm90.cuh itself, on a small kernel, whole and with one thing wrong."""

import ctypes
import functools
import struct

import pytest
import torch

from tests.cupy.emulated import HERE, compile_library
from tests.cupy.emulated_maps import matrices

LATE_COPIES, LATE_PRODUCTS = 4, 8
SEED = 16
ORDERS = (0, LATE_COPIES, LATE_PRODUCTS, 15, *(SEED * n + 4 * (n % 4) for n in range(1, 7)))


@functools.cache
def _library(dtype, keys, depth, columns):
    defines = {
        "PA_BFLOAT16": int(dtype == torch.bfloat16),
        "PA_KEYS": keys,
        "PA_DEPTH": depth,
        "PA_COLUMNS": columns,
    }
    loaded = ctypes.CDLL(str(compile_library("emulate_matmul_sm90.cpp", defines, HERE)))
    loaded.emulate.restype = ctypes.c_char_p
    loaded.emulate.argtypes = [ctypes.c_char_p, ctypes.c_int64] + [ctypes.c_int] * 4
    return loaded


def _run(
    order, dtype=torch.bfloat16, keys=48, depth=64, columns=40, rows=128, length=200, fault=0
):
    """Whether O = (A B^T) V is exact, or what the emulator said. Integers are, in every type."""
    generator = torch.Generator().manual_seed(0)

    def tensor(count, width):
        return torch.randint(-1, 2, (2, count, width), generator=generator).to(dtype)

    a, b, v = tensor(rows, depth), tensor(length, depth), tensor(length, columns)
    padded = -(-columns // 8) * 8
    output = torch.full((2, 128, padded), torch.nan)
    params = matrices(a, 64) + matrices(b, keys) + matrices(v, keys)
    params += struct.pack("=Qi52x", output.data_ptr(), -(-length // keys))
    shared = 2 * -(-depth // 64) * 8192 + 2 * (-(-depth // 64) + -(-columns // 64)) * keys * 128
    library = _library(dtype, keys, depth, padded)
    error = library.emulate(params, len(params), 2, shared + 40, order, fault)
    if error is not None:
        return error.decode()
    expected = torch.zeros(2, 128, padded)
    expected[:, :rows, :columns] = (a.float() @ b.float().mT) @ v.float()
    return torch.equal(output, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_both_products_are_exact(order):
    assert _run(order) is True


def test_several_panels_and_ends_inside_boxes():
    # A ends inside a box, K and V inside the last tile; V has two panels, the second cut off.
    assert _run(15, torch.float16, keys=80, depth=128, columns=72, rows=99, length=171) is True


# number: what is wrong, the order in which it shows, what the emulator says ("": a wrong result).
FAULTS = {
    1: ("no wait for a tile", LATE_COPIES, "more arrivals"),
    2: ("a tile handed back before its product is done", LATE_PRODUCTS, ""),
    3: ("no commit before a wait", LATE_PRODUCTS, ""),
    4: ("S read before its product is done", LATE_PRODUCTS, ""),
    5: ("operand A overwritten", LATE_PRODUCTS, "a register of operand A changed"),
    6: ("tiles never handed back", 0, "deadlock"),
    7: ("a store without a proxy fence", 0, "no async_proxy_fence"),
    8: ("no block barrier after the inits", 0, "before a block barrier"),
    9: ("an mbarrier within the data", 0, "data over the mbarrier"),
    10: ("no wgmma_fence", 0, "without wgmma_fence"),
    11: ("an arrival too many", LATE_COPIES, "more arrivals"),
    12: ("no wait at the end", 0, "not waited for"),
    13: ("a warp leaves before a named barrier", 0, "deadlock"),
    14: ("no fence after the inits", 0, "before mbarrier_init_fence"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_show(fault):
    """Else a pass of the kernels' tests would say little."""
    _, order, message = FAULTS[fault]
    result = _run(order, fault=fault)
    assert message in result if message else result is False
