"""A tuning database as tuners leave it: devices, problems, searches with rejections, finals."""

import functools
import tempfile
from pathlib import Path

from portattn.device import DeviceKey
from portattn.tuner import cases
from portattn.tuner.work import shape_of
from portattn.tuning_db.identity import toolchain_class
from portattn.tuning_db.key import bucket
from portattn.tuning_db.records import (
    KernelResult,
    Measurement,
    ProblemResult,
    Subject,
    Timing,
)
from portattn.tuning_db.store import Store

HOSTILE = "<script>alert(1)</script>'\"&"
CPU = DeviceKey("cpu", "GenuineIntel", f"a processor {HOSTILE}", "x86_64-v4", 2, 2, isa=("avx2",))
GPU = DeviceKey("cuda", "nvidia", "an H100", "sm_90", 132, 0, 232448, 65536, 50 << 20, 0, 80 << 30)
PROBLEMS = ("h8 s1024 d64 causal", "h8 s4096 d64 sliding_window:256")
SOURCE, SPACE = "a" * 64, "b" * 64


def timing(median_ns: int) -> Timing:
    low, high = median_ns - median_ns // 50, median_ns + median_ns // 50
    return Timing(median_ns, low, high, median_ns, 2, 9, low, high)


def attempts() -> list[Measurement]:
    """The default, ten others, and one of each of two failures."""
    blocks = (64, 16, 32, 48, 80, 96, 112, 128, 144, 160, 176)
    found = [
        Measurement(
            {"block_q": block, "pack": block % 32 == 0, "kind": "tiles" if block > 80 else "rows"},
            0,
            "ok",
            timing(2_000_000 + 9_000 * abs(block - 112)),
        )
        for block in blocks
    ]
    wrong = {"block_q": 256, "pack": True, "kind": "rows"}
    hung = {"block_q": 512, "pack": True, "kind": "rows"}
    found.insert(3, Measurement(wrong, 0, "wrong_result", error=f"off by 3 {HOSTILE}\nmore"))
    found.insert(7, Measurement(hung, 0, "run_timeout", error="no answer after 30 s"))
    return found


def store_search(store, run_id, case, device=CPU, kernel="cpu_forward", backend="cpu", factor=1):
    """One search with its verdict."""
    subject = Subject(
        *(device, bucket(case.problem), shape_of(case), "eager_warm", kernel, backend),
        *(SOURCE, SPACE),
    )
    for one in attempts():
        store.add(run_id, subject, one)
    best = Measurement(
        {"block_q": 112, "pack": False, "kind": "tiles"},
        1,
        "ok",
        timing(factor * 2_000_000),
        factor * 3_000_000,
    )
    result = KernelResult(
        *(kernel, backend, toolchain_class(backend), SOURCE, SPACE, (best,), best, 3, "rule"),
        confirmed_ns=factor * 2_000_000,
        confirmed_default_ns=factor * 2_900_000,
    )
    store.record(
        run_id, ProblemResult(device, subject.key, subject.shape, subject.policy, (result,))
    )


def fill(store) -> None:
    """Two problems on a CPU, one on a GPU with two kernels."""
    run_id = store.begin_run(effort="test", seed=0, budget={})
    for text in PROBLEMS:
        store_search(store, run_id, cases.parse(text))
    case = cases.parse("h16 s4096 d128 bfloat16 causal", "cuda")
    store_search(store, run_id, case, GPU, "triton_forward", "triton", factor=2)
    store_search(store, run_id, case, GPU, "cupy_forward_sm90", "cupy")
    store.finish_run(run_id, "done")


@functools.cache
def _content() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuning.db"
        store = Store(path)
        fill(store)
        store.engine.dispose()
        return path.read_bytes()


def database(folder: Path) -> Path:
    """A file with what `fill` stores; that waits for disks, so it is made once a process."""
    path = folder / "tuning.db"
    path.write_bytes(_content())
    return path
