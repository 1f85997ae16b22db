"""Every architecture's default kernels compile, fit, use matrix units, spill no more than before.

compile_ceilings.json holds, per architecture and case, the spill bytes a thread seen with the
pinned Triton; a rise is a regression to look at, not noise. No GPU is needed, and nothing here is
run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
CEILINGS = json.loads((FOLDER / "compile_ceilings.json").read_text())
MATRIX_UNITS = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx90a": "v_mfma",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}
# What every run compiles; the rest is slow. All score terms, ids, cut rows and a later pass: once
# per vendor's oldest and newest. sm_89 has the limits and instructions of sm_86.
QUICK = {arch: ["dense_d128"] for arch in MATRIX_UNITS if arch != "sm_89"}
QUICK["sm_80"] = QUICK["sm_90"] = ["dense_d128", "rich_d64"]


def compile_cases(arch, cases, repository, cache):
    """What compile_target.py prints, from a process with a compiler cache of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = str(repository)
    result = subprocess.run(
        [sys.executable, str(FOLDER / "compile_target.py"), arch, *cases],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def check(arch, cases):
    for case, made in cases.items():
        name = f"{arch} {case}: {made}"
        assert made["infeasible"] == [], name
        assert made["shared_bytes"] <= made["limit_bytes"], name
        # The model that prunes configs must not promise less than the compiler takes.
        assert made["shared_bytes"] <= made["model_bytes"], name
        assert made["spill_bytes"] <= CEILINGS[arch][case], name
        if not case.startswith("float32") or arch.startswith("gfx"):
            assert MATRIX_UNITS[arch] in made["matrix_instructions"], name
        if made["config"]["tma"] and not case.startswith("stepped"):
            assert made["copies"] == ["cp.async.bulk.tensor"], name
        if case.startswith(("rich", "sparse", "stepped")) and not arch.startswith("gfx"):
            assert made["counter_is_acquire_release"], name


@pytest.mark.parametrize("arch", QUICK)
def test_default_kernels(arch, repository, tmp_path):
    check(arch, compile_cases(arch, QUICK[arch], repository, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("arch", MATRIX_UNITS)
def test_all_kernels(arch, repository, tmp_path):
    check(arch, compile_cases(arch, list(CEILINGS[arch]), repository, tmp_path))
