"""Reading on the call path: the ladder, and every way in which a database can be unusable."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given, strategies

from portattn import masks
from portattn.tuning_db import lookup, seeds
from portattn.tuning_db.identity import toolchain_class
from portattn.tuning_db.key import bucket, distance
from portattn.tuning_db.location import locate
from portattn.tuning_db.nearest import Group
from portattn.tuning_db.snapshot import StoredConfig
from tests.tuning_db.conftest import PROBLEM

PARAMS = {"block_q": 32, "pack": True}


def test_the_ladder(fill, make_result, problem, device, vary):
    other_device = vary(device, cores=64, threads=64)
    stranger = vary(device, arch="aarch64")
    near = vary(problem, seqlen_q=2048, seqlen_k=2048)
    far = vary(problem, seqlen_q=1 << 15, seqlen_k=1 << 15)
    fill(make_result(PARAMS))
    assert lookup.find("cpu_forward", problem, device) == (PARAMS, "exact")
    assert lookup.find("cpu_forward", vary(problem, seqlen_k=700), device).rung == "exact"
    assert (
        lookup.find("cpu_forward", problem, device, kernel_source=lambda: "a" * 64).rung == "exact"
    )
    assert lookup.find("cpu_forward", near, other_device) == (PARAMS, "nearest")
    assert lookup.find("cpu_forward", problem, other_device) == (PARAMS, "family")
    assert lookup.find("cpu_forward", near, device) == (PARAMS, "nearest")
    assert lookup.find("cpu_forward", far, device) is None
    assert lookup.find("cpu_forward", problem, stranger) is None
    assert lookup.find("cpu_decode", problem, device) is None
    lookup.reload()
    assert (
        lookup.find("cpu_forward", problem, device, kernel_source=lambda: "c" * 64).rung == "stale"
    )


def test_another_toolchain_is_stale(fill, make_result, problem, device):
    fill(make_result(PARAMS, toolchain="native-0.0.1"))
    assert lookup.find("cpu_forward", problem, device).rung == "stale"
    fill(make_result({"block_q": 64, "pack": False}, median_ns=5000, default_ns=6000))
    assert lookup.find("cpu_forward", problem, device) == ({"block_q": 64, "pack": False}, "exact")


def test_seeds_come_after_the_family_and_before_the_nearest(
    fill, make_result, problem, device, vary, monkeypatch
):
    seed = StoredConfig("cpu_forward", "", bucket(problem), {"block_q": 99}, device.family)
    text = seeds.dump(device.family, [seed])
    assert [row.params for row in seeds.parse(text)] == [{"block_q": 99}]
    monkeypatch.setattr(seeds, "load_all", lambda: (seeds.parse(text), []))
    fill(make_result(PARAMS, problem=vary(problem, seqlen_q=2048, seqlen_k=2048)))
    assert lookup.find("cpu_forward", problem, device) == ({"block_q": 99}, "seeds")
    fill(make_result(PARAMS, device=vary(device, threads=1)))
    assert lookup.find("cpu_forward", problem, device) == (PARAMS, "family")


def seed_of(name, problem, device, time_ns, toolchain=""):
    return StoredConfig(
        name, "triton", bucket(problem), {"block_q": time_ns}, device.family,
        toolchain_class=toolchain, median_ns=time_ns, default_ns=10_000,
    )  # fmt: skip


@pytest.fixture
def ship(monkeypatch):
    """Make these seeds the shipped ones."""

    def install(device, *rows):
        text = seeds.dump(device.family, rows)
        assert seeds.dump(device.family, seeds.parse(text)) == text
        monkeypatch.setattr(seeds, "load_all", lambda: (seeds.parse(text), []))
        lookup.reload()

    yield install
    monkeypatch.undo()
    lookup.reload()


def test_seeds_of_another_compiler_are_candidates_and_no_answers(ship, problem, device, vary):
    ship(device, seed_of("a", problem, device, 5000, "triton-0.1"))
    assert lookup.find("a", problem, device) is None
    assert lookup.ranking(["a"], problem, device) == ()
    assert [row.params for row in lookup.known("a", device.family)] == [{"block_q": 5000}]
    near = vary(problem, seqlen_q=2048, seqlen_k=2048)
    here = toolchain_class("triton")
    ship(
        device,
        seed_of("a", problem, device, 5000, "triton-0.1"),
        seed_of("a", near, device, 6000, here),
    )
    assert lookup.find("a", problem, device) == ({"block_q": 6000}, "nearest")


def test_seeds_rank_kernels_until_this_device_was_measured(
    ship, fill, make_result, problem, device, vary
):
    ship(
        device,
        seed_of("cpu_forward", problem, device, 7000),
        seed_of("rival", problem, device, 5000),
        seed_of("slow", problem, device, 10_000),
    )
    names = ["cpu_forward", "rival", "slow"]
    near = vary(problem, seqlen_q=2048, seqlen_k=2048)
    far = vary(problem, seqlen_q=1 << 15, seqlen_k=1 << 15)
    assert lookup.find("slow", problem, device) == ({}, "seeds")  # the default was best
    assert lookup.ranking(names, problem, device) == ("rival", "cpu_forward", "slow")
    assert lookup.ranking(names, near, device) == ("rival", "cpu_forward", "slow")
    assert lookup.ranking(names, far, device) == ()
    assert lookup.ranking(["unknown", "rival"], problem, device) == ()
    fill(make_result(PARAMS))
    lookup.reload()
    assert lookup.ranking(names, problem, device) == ("cpu_forward",)


def test_shipped_seeds_are_valid():
    rows, problems = seeds.load_all()
    assert problems == []
    assert all(row.origin == "seed" and row.family for row in rows)
    assert len({(row.family, row.kernel_name, row.key) for row in rows}) == len(rows)


def test_every_shipped_seed_is_the_answer_for_its_own_problem(database, device, vary, monkeypatch):
    rows, _ = seeds.load_all()
    toolchains = {row.backend: row.toolchain_class for row in rows}
    monkeypatch.setattr(lookup, "toolchain_class", toolchains.__getitem__)
    for row in rows:
        kind, _, arch = row.family.partition("-")
        there = vary(device, kind=kind, arch=arch)
        found = lookup._search(lookup._loaded(), row.kernel_name, row.key, there, None)
        assert found == ({} if row.is_default else row.params, "seeds")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": "portattn-seeds", "version": 2}',
        '{"format": "portattn-seeds", "version": 1, "family": 1}',
        '{"format": "portattn-seeds", "version": 1, "family": "f", "entries": [{"kernel": "k"}]}',
        '{"format": "portattn-seeds", "version": 1, "family": "f", "entries": '
        '[{"kernel": "k", "problem": {}}]}',
    ],
)
def test_a_bad_seeds_file_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        seeds.parse(text)


def test_a_lookup_is_a_dictionary_hit(fill, make_result, problem, device, vary):
    fill(make_result(PARAMS))
    problem = vary(problem, program=masks.longformer(512, 64).program)
    assert lookup.find("cpu_forward", problem, device) is None
    started = time.perf_counter()
    for _ in range(2000):
        lookup.find("cpu_forward", problem, device)
    assert (time.perf_counter() - started) / 2000 < 50e-6  # 3 us on an idle machine


def test_a_new_process_reads_what_was_stored_without_sqlalchemy(fill, make_result, repository):
    fill(make_result(PARAMS))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from conftest import PROBLEM, DEVICE, lookup\n"
        "[sys.modules.pop(n) for n in list(sys.modules) if n.startswith(('sqlalchemy', "
        "'alembic'))]\n"
        "print(lookup.find('cpu_forward', PROBLEM, DEVICE), 'sqlalchemy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(repository / "tests" / "tuning_db")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
        check=True,
    )
    assert done.stdout.strip() == f"Found(params={PARAMS}, rung='exact') False"


def test_status_says_what_is_there(fill, make_result):
    fill(make_result(PARAMS))
    status = lookup.status()
    assert (status.state, status.rows, status.invalid_rows) == ("ok", 1, 0)
    assert status.location == locate()
    assert json.dumps(status.detail) == '""'


def test_after_loading_there_is_no_sql(fill, make_result, problem, device, vary, monkeypatch):
    fill(make_result())
    assert lookup.status().rows == 1

    def refuse(*arguments, **options):
        raise AssertionError("SQL on the call path")

    monkeypatch.setattr("sqlite3.connect", refuse)
    monkeypatch.setattr("sqlalchemy.create_engine", refuse)
    for length in (1024, 1000, 600, 3000, 70_000):
        lookup.find("cpu_forward", vary(problem, seqlen_k=length), device)
        lookup.ranking(["cpu_forward"], vary(problem, seqlen_k=length), device)


def test_a_new_length_of_a_known_bucket_is_not_searched_again(
    fill, make_result, problem, device, vary, monkeypatch
):
    fill(make_result())
    first = lookup.find("cpu_forward", problem, device)
    monkeypatch.setattr(lookup, "_search", None)
    assert lookup.find("cpu_forward", vary(problem, seqlen_k=1000), device) is first


SIZES = strategies.sampled_from((0, 1, 2, 8, 64, 1024, 65536))


@given(
    strategies.lists(strategies.tuples(*([SIZES] * 5)), min_size=1, max_size=12),
    strategies.tuples(*([SIZES] * 5)),
)
def test_the_nearest_is_that_of_the_distance(tuned, asked):
    def key_of(sizes):
        batch, heads, length, window, block = sizes
        kv_heads = max(heads // 4, 1)
        return dataclasses.replace(
            bucket(PROBLEM),
            batch_bucket=batch,
            hq=max(heads, 1),
            hkv=kv_heads,
            sk_bucket=length,
            window_bucket=window,
            block_size=block,
        )

    group, asked_key = Group(), key_of(asked)
    for sizes in tuned:
        group.add(StoredConfig("k", "cpu", key_of(sizes), {}, "f"))
    apart = {key: distance(key, asked_key) for key in group.rows}
    least = min(apart.values())
    found = group.near(asked_key, 4.0)
    if least > 4.0:
        assert found == []
    else:
        assert {key for key, value in apart.items() if value <= least + 1e-9} == set(found)
