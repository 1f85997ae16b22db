"""Where problems to tune come from: files, models, and what the database knows."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portattn import masks
from portattn.device import device_key
from portattn.errors import TuningError
from portattn.tuner import cases, models, sources
from portattn.tuner.work import shape_of
from portattn.tuning_db import misses
from portattn.tuning_db.identity import canonical_json
from portattn.tuning_db.key import bucket
from portattn.tuning_db.location import locate
from portattn.tuning_db.store import Store
from tests import stored

LINES = """
# what our model does
b1 h8 s4096 d64 causal   # prompts

b8 h8 sq1 sk4096 d64 kv_lengths
"""
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "sliding_window": None,
}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "tuning.db")


def labels(found):
    return [bucket(case.problem).label for case in found]


def test_a_file_holds_a_problem_a_line_or_json(tmp_path):
    path = tmp_path / "problems"
    path.write_text(LINES)
    lines = sources.read_file(path, "cpu")
    assert [case.problem.seqlen_q for case in lines] == [4096, 1]
    path.write_text(json.dumps(["h8 s4096 d64 causal", "b8 h8 sq1 sk4096 d64 kv_lengths"]))
    assert sources.read_file(path, "cpu") == lines
    path.write_text("h8 s64 d64\nh8 s64 d64 sideways\n")
    with pytest.raises(TuningError, match=r"line 2.*'sideways' is not known"):
        sources.read_file(path, "cpu")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TuningError, match="cannot be read"):
        sources.read_file(path, "cpu")
    with pytest.raises(TuningError, match="cannot be read"):
        sources.read_file(tmp_path / "absent", "cpu")


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_is_a_list_of_problems(name):
    model = models.MODELS[name]
    found = models.model_cases(name, "cuda")
    assert found == list(dict.fromkeys(found))
    assert {case.problem.dtype for case in found} == {"bfloat16"}
    assert {case.problem.num_kv_heads for case in found} == {model.kv_heads}
    assert max(case.problem.seqlen_k for case in found) <= model.length
    decodes = any(case.problem.seqlen_q == 1 for case in found)
    assert decodes == (model.kind == "decoder")


def test_a_transformers_config_is_a_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    assert models.model_cases(str(path), "cpu") == models.model_cases("llama-3-8b", "cpu")
    nested = {**LLAMA, "sliding_window": 512, "architectures": ["AnEncoder"]}
    path.write_text(json.dumps({"text_config": nested}))
    # An encoder does not have the window of a decoder.
    assert labels(models.model_cases(str(path), "cpu")) == ["b8 h32 kv8 s8192 d128 float32 dense"]
    mixed = {**LLAMA, "sliding_window": 512, "layer_types": [], "attn_logit_softcapping": 50.0}
    path.write_text(json.dumps(mixed))
    said = labels(models.model_cases(str(path), "cpu"))
    assert "b1 h32 kv8 s4096 d128 float32 causal band~512 softcap" in said
    assert "b1 h32 kv8 s4096 d128 float32 causal softcap" in said
    image = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
    path.write_text(json.dumps(image))
    assert models.model_cases(str(path), "cpu") == models.model_cases("vit-b-16", "cpu")
    for bad in ("[]", "{", "{}", '{"num_attention_heads": true, "hidden_size": 8}'):
        path.write_text(bad)
        with pytest.raises(TuningError):
            models.model_cases(str(path), "cpu")
    with pytest.raises(TuningError, match="llama-3-8b"):
        models.model_cases("no-such-model", "cpu")


def with_data():
    ids = torch.arange(300) // 40
    return (
        masks.documents([0, 100, 300]) & masks.causal(),
        masks.padding(torch.tensor([100, 300])),
        masks.longformer(64, torch.tensor([1, 5])),
        masks.block_sparse(torch.ones(5, 5, dtype=torch.bool), 64),
        masks.Segments(ids.int(), ids.int()) | ~masks.padding(torch.tensor([3, 4])),
        masks.per_head([masks.causal(), masks.local(3, 4), masks.dilated(8, 2), masks.causal()]),
    )


@pytest.mark.parametrize("mask", with_data(), ids=str)
def test_a_problem_is_made_again_without_its_masks_data(mask):
    case = cases.with_mask(cases.parse("b2 h4 s300 d64 softcap lse"), mask)
    values = dataclasses.asdict(case.problem)
    again = sources.rebuild(values, case.problem.program, ["softcap", "grad"], "cpu")
    assert bucket(again.problem) == bucket(case.problem)
    assert again.mask.density(300, 300) > 0


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from([*sources._SIZES, "q_offset", "dtype"]), st.integers()),
       st.lists(st.integers(-5, 40), max_size=12))  # fmt: skip
def test_what_the_database_says_is_not_trusted(changes, program):
    values = dataclasses.asdict(cases.parse("b2 h4 s30 d8").problem) | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_MAX_SIZE", 4096)
        try:
            case = sources.rebuild(values, program, [], "cpu")
        except (TuningError, ValueError):
            return
    assert case.problem.program == tuple(program)


def test_missed_problems_are_made_again(store, monkeypatch):
    monkeypatch.setattr(misses, "_start", lambda: None)
    device = device_key("cpu")
    case = cases.with_mask(cases.parse("b2 h4 s300 d64 sinks"), with_data()[0])
    misses.note(store.location, case.problem, device, "default")
    assert misses.flush() == 1
    misses._pending.clear()
    found = sources.missed(store, device.fingerprint, "cpu")
    assert labels(found.cases) == [bucket(case.problem).label]
    assert found.left_out == {}
    with store.transaction() as connection:
        connection.exec_driver_sql("""UPDATE miss SET problem_json = '{"program": 3}'""")
    found = sources.missed(store, device.fingerprint, "cpu")
    assert found.cases == ()
    assert len(found.left_out) == 1


def test_stale_are_those_whose_toolchain_source_or_space_changed(store, monkeypatch):
    device = device_key("cpu")
    run_id = store.begin_run(effort="test", seed=0, budget={})
    texts = (*stored.PROBLEMS, "h2 s64 d16")
    for text in texts:
        stored.store_search(store, run_id, cases.parse(text), device)
    found = sources.stale(store, device, "cpu")  # stored with another source and space
    assert set(labels(found.cases)) == set(labels(map(cases.parse, texts)))
    monkeypatch.setattr(sources, "source_of_files", lambda _: stored.SOURCE)
    monkeypatch.setattr(sources, "space_sha256", lambda _: stored.SPACE)
    assert sources.stale(store, device, "cpu") == sources.Found((), {})
    monkeypatch.setattr(sources, "toolchain_class", lambda _: "native-9")
    assert len(sources.stale(store, device, "cpu").cases) == 3
    assert sources.stale(store, stored.GPU, "cuda").cases == ()
    old = {**shape_of(cases.parse(stored.PROBLEMS[1]))}
    del old["program"]  # as versions before this one stored it
    with store.transaction() as connection:
        connection.exec_driver_sql("UPDATE measurement SET shape_json = ?", (canonical_json(old),))
    found = sources.stale(store, device, "cpu")
    assert len(found.cases) == 2  # dense and causal say enough
    assert any("which mask" in why for why in found.left_out.values())


def test_the_database_of_a_server_is_no_place_to_store():
    with pytest.raises(TuningError, match="server to read from"):
        Store("http://localhost:1")
    assert locate("http://name:secret@host").shown == "http://name:***@host"
