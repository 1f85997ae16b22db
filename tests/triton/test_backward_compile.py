"""The backward's default kernels compile, fit, use matrix units, spill no more than before.

No GPU is needed, and nothing here is run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_backward_target.py"
MATRIX_UNITS = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx90a": "v_mfma",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}
QUICK = {"sm_80": ["plain_d128"], "sm_90": ["hopper_d64", "hopper_d128"]}
ALL = ["plain_d64", "plain_d128", "plain_d256", "float32_d64", "rich_d64"]
HOPPER = ["hopper_d64", "hopper_d128", "hopper_rich"]
# Bytes of a thread's stack, the larger of Triton 3.6 and 3.9; a rise is a regression to look at.
SPILL_BYTES = {"plain": 1024, "float32": 1024, "rich": 6144}
# Spill instructions in the Gluon kernel's main loops, of both consumers together.
LOOP_SPILLS = {"hopper_d64": 0, "hopper_d128": 128, "hopper_rich": 12}


def compile_cases(arch, cases, repository, cache):
    """What the script prints, from a process with a compiler cache of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = str(repository)
    result = subprocess.run(
        [sys.executable, str(SCRIPT), arch, *cases],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def check_plain(arch, case, made):
    for part in ("column", "row"):
        found, name = made[part], f"{arch} {case} {part}: {made}"
        # The model that prunes configs must not promise less than the compiler takes.
        assert found["shared_bytes"] <= found["model_bytes"] <= found["limit_bytes"], name
        assert found["spill_bytes"] <= SPILL_BYTES[case.partition("_")[0]], name
        if not case.startswith("float32") or arch.startswith("gfx"):
            assert MATRIX_UNITS[arch] in found["matrix_instructions"], name


def check(arch, cases):
    for case, made in cases.items():
        assert made["infeasible"] == [], (arch, case, made)
        if case.startswith("hopper"):
            assert made["shared_bytes"] <= made["model_bytes"], (case, made)
            assert made["loop_spills"] <= LOOP_SPILLS[case], (case, made)
            assert made["late_exponentials"] == 0, (case, made)
            assert made["warnings"] == [], (case, made)
        else:
            check_plain(arch, case, made)


@pytest.mark.parametrize("arch", QUICK)
def test_default_kernels(arch, repository, tmp_path):
    check(arch, compile_cases(arch, QUICK[arch], repository, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("arch", MATRIX_UNITS)
def test_all_kernels(arch, repository, tmp_path):
    more = HOPPER if arch == "sm_90" else []
    check(arch, compile_cases(arch, ALL + more, repository, tmp_path))
