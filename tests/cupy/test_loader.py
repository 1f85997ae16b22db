"""NVRTC, and the cache of cubins on disk."""

import re

import pytest

from portattn.backends.cupy import loader
from portattn.backends.cupy.config import ForwardSm80Config, Variant
from portattn.errors import UnsupportedError

CONFIG = ForwardSm80Config(64, 32, 4, 1, 1)
PROGRAM = Variant("float16", 32, 32, True, False, False, False, CONFIG).program("sm_80")


@pytest.fixture
def compiles(monkeypatch):
    """The programs that were compiled; each gives a small ELF file."""
    programs = []

    def compile_program(program):
        programs.append(program)
        return loader.Compiled(b"\x7fELF" + str(len(programs)).encode(), "")

    monkeypatch.setattr(loader, "compile_program", compile_program)
    return programs


def test_a_cubin_is_compiled_once(compiles, tmp_path):
    first = loader.cached_cubin(PROGRAM, tmp_path)
    assert loader.cached_cubin(PROGRAM, tmp_path) == first
    assert compiles == [PROGRAM]
    assert [path.suffix for path in tmp_path.iterdir()] == [".cubin"]


@pytest.mark.parametrize("content", [b"", b"half a fi"])
def test_a_broken_file_is_compiled_anew(compiles, tmp_path, content):
    loader.cached_cubin(PROGRAM, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    assert loader.cached_cubin(PROGRAM, tmp_path) == b"\x7fELF2"
    assert path.read_bytes() == b"\x7fELF2"


def test_a_cache_that_cannot_be_written_is_passed_over(compiles, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert loader.cached_cubin(PROGRAM, tmp_path / "file") == b"\x7fELF1"
    assert loader.cached_cubin(PROGRAM, tmp_path / "file") == b"\x7fELF2"


def test_the_key_holds_sources_options_and_compiler(monkeypatch):
    keys = {loader.cache_key(PROGRAM)}
    keys.add(
        loader.cache_key(
            Variant("float16", 32, 64, True, False, False, False, CONFIG).program("sm_80")
        )
    )
    keys.add(
        loader.cache_key(
            Variant("float16", 32, 32, True, False, False, False, CONFIG).program("sm_86")
        )
    )
    monkeypatch.setattr(loader, "_read", lambda name: f"changed {name}")
    keys.add(loader.cache_key(PROGRAM))
    assert len(keys) == 4


def included(name):
    """Headers that a CUDA source includes, directly or not."""
    text = (loader.SOURCE_DIR / name).read_text(encoding="utf-8")
    direct = set(re.findall(r'^#include "(\w+\.cuh)"', text, re.MULTILINE))
    return direct.union(*(included(header) for header in direct))


def test_every_header_is_known_to_the_loader():
    assert included(PROGRAM.source) == set(PROGRAM.headers)


def test_what_nvrtc_refuses_is_reported_with_its_log():
    broken = loader.Program(PROGRAM.source, PROGRAM.entry, (("PA_DTYPE", 0),), "sm_80")
    with pytest.raises(UnsupportedError, match="PA_HEAD_DIM"):
        loader.compile_program(broken)


def test_a_log_without_a_report_is_an_error():
    with pytest.raises(ValueError, match="no ptxas report"):
        loader.Compiled(b"", "").resources()
