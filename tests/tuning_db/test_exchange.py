"""Export and import."""

import json

import pytest
import sqlalchemy

from portattn.errors import TuningError
from portattn.tuning_db import lookup, schema
from portattn.tuning_db.exchange import export_text, import_text
from portattn.tuning_db.store import Store


@pytest.fixture
def store(either):
    return Store(either)


@pytest.fixture
def exported(fill, store, make_result, problem, device, vary):
    fill(
        make_result(),
        make_result(problem=vary(problem, seqlen_q=1, features=frozenset({"softcap"}))),
    )
    fill(
        make_result(
            {"block_q": 128, "pack": False}, 700, device=vary(device, threads=1), kernel="other"
        )
    )
    return export_text(store)


def test_export_import_export_is_the_same_bytes(exported, tmp_path):
    second = Store(tmp_path / "second.db")
    added = import_text(second, exported)
    assert added["measurement"] == 9
    assert added["best"] == 3
    assert export_text(second) == exported
    assert import_text(second, exported) == dict.fromkeys(added, 0)  # once more changes nothing
    assert export_text(second) == exported


def test_imported_rows_are_used_and_say_where_they_are_from(
    exported, tmp_path, monkeypatch, problem, device
):
    monkeypatch.setenv("PORTATTN_DB", str(tmp_path / "second.db"))
    store = Store()
    import_text(store, exported)
    lookup.reload()
    assert lookup.find("cpu_forward", problem, device) == ({"block_q": 32, "pack": True}, "exact")
    with store.transaction() as connection:
        sources = set(connection.execute(sqlalchemy.select(schema.best.c.source)).scalars())
    assert sources == {"import"}


def test_of_two_best_rows_the_faster_stays_whatever_the_order(make_result, tmp_path):
    texts = []
    for name, median in (("a", 1000), ("b", 800)):
        store = Store(tmp_path / f"{name}.db")
        run_id = store.begin_run(effort="test", seed=0, budget={})
        store.record(run_id, make_result({"block_q": median, "pack": True}, median))
        texts.append(export_text(store))
    merged = []
    for order in (texts, texts[::-1]):
        store = Store(tmp_path / f"merged{len(merged)}.db")
        for text in order:
            import_text(store, text)
        merged.append(export_text(store))
    assert merged[0] == merged[1]
    assert json.loads(merged[0])["tables"]["best"][0]["median_ns"] == 800


def change(path, value):
    """An edit of the exported content: path is keys and indices."""

    def edit(content):
        *parents, last = path
        for step in parents:
            content = content[step]
        content[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(["format"], "x"), "not a portattn-tuning file"),
        (change(["version"], 2), "version 2"),
        (change(["schema"], "9999"), "schema 9999"),
        (change(["tables"], {}), "must hold exactly"),
        (change(["tables", "best"], {}), "not a list"),
        (change(["tables", "best", 0], 1), r"best\[0\] must be an object"),
        (change(["tables", "best", 0, "median_ns"], "1; DROP TABLE best"), r"best\[0\].median_ns"),
        (change(["tables", "best", 0, "median_ns"], 0), "not positive"),
        (change(["tables", "best", 0, "median_ns"], 2**70), r"best\[0\].median_ns"),
        (change(["tables", "best", 0, "gain"], True), r"best\[0\].gain"),
        (change(["tables", "best", 0, "config_id"], 99), "does not name a row of config"),
        (change(["tables", "best", 0, "config_id"], True), "does not name a row of config"),
        (change(["tables", "config", 0, "params_json"], '{"a":[]}'), r"config|field"),
        (change(["tables", "config", 0, "params_json"], '{"a":1}'), "params_sha256"),
        (change(["tables", "config", 0, "params_json"], "x" * 70000), r"config\[0\].params_json"),
        (change(["tables", "config", 0, "params_json"], '{"a": 1}'), "canonical"),
        (change(["tables", "problem", 0, "hq"], 3), "key_sha256"),
        (change(["tables", "problem", 0, "causal"], 1), r"problem\[0\].causal"),
        (change(["tables", "measurement", 0, "status"], "fine"), "must be one of"),
        (change(["tables", "device", 0, "name"], "x" * 300), r"device\[0\].name"),
        (change(["tables", "device", 0, "name"], "a\0b"), r"device\[0\].name"),
        (change(["tables", "device", 0, "extra"], 1), "exactly the fields"),
    ],
)
def test_a_changed_file_is_refused_whole(edit, message, exported, tmp_path):
    content = json.loads(exported)
    edit(content)
    store = Store(tmp_path / "second.db")
    empty = export_text(store)
    with pytest.raises(TuningError, match=message):
        import_text(store, json.dumps(content))
    assert export_text(store) == empty


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"format": NaN}', "null", '"portattn-tuning"']
)
def test_text_that_is_no_export_is_refused(text, store):
    with pytest.raises(TuningError, match="cannot be imported"):
        import_text(store, text)
