"""docs/targets.md against the code: every default config on every target, within its limits."""

import json
import re
import subprocess
import sys

import pytest

from tools import target_table

ROW = re.compile(r"\| (.+?) \| (\w+) \| `(.+?)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|")
SPILL_NOISE_BYTES = 64


def documented(kernel):
    """(case, arch) -> config, registers, shared bytes, limit, spilled bytes."""
    text = target_table.DOCUMENT.read_text(encoding="utf-8")
    section = text.split(f"\n## {kernel.name}\n")[1].split("\n## ")[0]
    return {(row[0], row[1]): row[2:] for row in ROW.findall(section)}


@pytest.mark.parametrize("kernel", target_table.KERNELS, ids=lambda kernel: kernel.name)
def test_the_table_has_the_defaults_and_they_fit(kernel):
    rows = documented(kernel)
    assert set(rows) == {(case, arch) for case in kernel.cases for arch in kernel.archs}
    for (case, arch), (config, registers, shared, limit, _) in rows.items():
        now = target_table.config_text(kernel.default(kernel.cases[case], arch))
        assert config == now, f"{kernel.name} {case} {arch}: run -m tools.target_table"
        assert int(limit) == target_table.limit_bytes(arch)
        assert int(shared) <= int(limit)
        assert int(registers) <= (512 if arch.startswith("gfx") else 255)


@pytest.mark.slow
@pytest.mark.parametrize("arch", target_table.NVIDIA + target_table.AMD)
def test_compiled_again_nothing_has_grown(arch):
    command = [sys.executable, "-m", "tools.target_table", "--arch", arch]
    result = subprocess.run(command, capture_output=True, text=True, cwd=target_table.ROOT)
    assert result.returncode == 0, result.stderr[-4000:]
    made = json.loads(result.stdout.splitlines()[-1])
    for kernel in target_table.KERNELS:
        for (case, row_arch), row in documented(kernel).items():
            if row_arch != arch:
                continue
            used = made[f"{kernel.name}/{case}/{arch}"]
            name = f"{kernel.name} {case} {arch}: {used}"
            assert used["shared_bytes"] <= target_table.limit_bytes(arch), name
            assert used["spill_bytes"] <= int(row[4]) + SPILL_NOISE_BYTES, name
