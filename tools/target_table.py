"""Writes docs/targets.md: what every kernel's default config takes on every architecture.

    python -m tools.target_table [KERNEL ...]               a few minutes without a GPU
    python -m tools.target_table --arch sm_90 [KERNEL ...]  only print these rows, as JSON

The kernels are those of target_kernels.py. Each architecture compiles in a process of its own: an
impossible combination may abort the compiler's process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tools.target_kernels import AMD, KERNELS, NVIDIA

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from portattn.backends.base import Config
    from portattn.problem import AttentionProblem
    from tools.target_kernels import Kernel

    Made: TypeAlias = dict[str, dict[str, int]]  # "kernel/case/arch" -> fields of Usage

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "targets.md"


def limit_bytes(arch: str) -> int:
    """Most shared memory of a block."""
    from portattn.backends.triton.limits import limits_of

    return limits_of(arch).shared_bytes


HEADER = """\
# Default configs on every target

What the compilers make of each kernel's default config, without the GPU: registers and spilled
bytes a thread (AMD: VGPRs and scratch), shared memory a block (AMD: LDS), and how much of it the
device has for one. *dense* is full or causal attention, *sparse* a window of 1024 keys, both at
4096 tokens and 8 heads; decode is one query row of 32 heads with 8 KV heads of 8192 keys, batch
16. Kernels with a producer warp launch with the registers shown and divide them anew as they
start. Only sm_90 has been run (an H100); the others are compiled.

Compilers: Triton {triton}, NVRTC {nvrtc}. Written by `python -m tools.target_table`; tests hold
its configs to the code's and its figures to the devices' limits.
"""


def rows() -> Iterator[tuple[Kernel, str, AttentionProblem, str]]:
    """Kernel, case, problem and architecture of each row, in the table's order."""
    for kernel in KERNELS:
        for case, problem in kernel.cases.items():
            for arch in kernel.archs:
                yield kernel, case, problem, arch


def config_text(config: Config) -> str:
    """The fields' values, in the order of the section's heading."""
    values = (int(v) if isinstance(v, bool) else v for v in config.to_dict().values())
    return " ".join(str(value) for value in values)


def compile_arch(arch: str, names: Collection[str]) -> Made:
    """Usage of the kernels' cases on one architecture."""
    return {
        f"{kernel.name}/{case}/{arch}": dataclasses.asdict(kernel.compile(problem, arch))
        for kernel, case, problem, row_arch in rows()
        if row_arch == arch and kernel.name in names
    }


def compile_all(names: Collection[str]) -> Made:
    """The same on all architectures, each in its own process."""
    made: Made = {}
    archs = {arch: None for kernel, _, _, arch in rows() if kernel.name in names}
    for arch in archs:
        command = [sys.executable, "-m", "tools.target_table", *names, "--arch", arch]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if result.returncode != 0:
            raise SystemExit(f"{arch} does not compile:\n{result.stderr[-4000:]}")
        found = json.loads(result.stdout.splitlines()[-1])
        print(f"{arch}: {len(found)} rows", flush=True)
        made |= found
    return made


def section(kernel: Kernel, made: Made) -> str:
    """A kernel's part of docs/targets.md."""
    first = next(iter(kernel.cases.values()))
    fields = " ".join(kernel.default(first, kernel.archs[0]).to_dict())
    lines = ["", f"## {kernel.name}", "", f"Config: `{fields}`.", ""]
    lines += ["| case | target | config | registers | shared | of | spilled |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for owner, case, problem, arch in rows():
        if owner is kernel:
            used = made[f"{kernel.name}/{case}/{arch}"]
            config = config_text(kernel.default(problem, arch))
            lines.append(
                f"| {case} | {arch} | `{config}` | {used['registers']} | {used['shared_bytes']} "
                f"| {limit_bytes(arch)} | {used['spill_bytes']} |"
            )
    return "\n".join(lines) + "\n"


def written_section(name: str) -> str:
    """The same as it stands in the file, for a kernel that is not compiled again."""
    text = DOCUMENT.read_text(encoding="utf-8")
    heading = f"\n## {name}\n"
    return heading + text.split(heading)[1].split("\n## ")[0]


def document(made: Made, names: Collection[str]) -> str:
    """The text of docs/targets.md; sections of kernels not in `names` as they stand."""
    import triton

    parts = [
        section(kernel, made) if kernel.name in names else written_section(kernel.name)
        for kernel in KERNELS
    ]
    return HEADER.format(triton=triton.__version__, nvrtc=nvrtc_version()) + "".join(parts)


def nvrtc_version() -> str:
    """NVRTC's version."""
    from cupy.cuda import nvrtc

    major, minor = nvrtc.getVersion()
    return f"{major}.{minor}"


def main() -> None:
    """Compile and write the table; or print one architecture's rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [kernel.name for kernel in KERNELS]
    parser.add_argument("kernels", nargs="*", choices=[[], *names], help="all, if none is named")
    parser.add_argument("--arch", choices=NVIDIA + AMD)
    args = parser.parse_args()
    chosen = args.kernels or names
    if args.arch is not None:
        print(json.dumps(compile_arch(args.arch, chosen)))
        return
    text = document(compile_all(chosen), chosen)
    DOCUMENT.write_text(text, encoding="utf-8")
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
