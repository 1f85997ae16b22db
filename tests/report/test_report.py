"""The report: one file that loads nothing, says what is stored, and trusts none of it."""

import contextlib
import html.parser
import random
import re
import sqlite3

import pytest
import sqlalchemy

from portattn.errors import TuningError
from portattn.report import charts, text
from portattn.report.reader import Reader
from portattn.report.records import Attempt, Course
from portattn.report.write import report
from portattn.tuning_db.location import locate
from portattn.tuning_db.store import Store
from tests import stored

VOID = {"meta", "input", "br", "link"}


class Page(html.parser.HTMLParser):
    """Elements, with their attributes and texts; unbalanced ones are an error."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag, kind=""):
        return [one for name, one in self.elements
                if name == tag and kind in [*one.get("class", "").split(" "), ""]]  # fmt: skip


@pytest.fixture
def database(tmp_path):
    return stored.database(tmp_path)


def change(path, sql, *values):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA ignore_check_constraints=ON")
        connection.execute(sql, values)
        connection.commit()


def test_it_says_what_is_stored(database):
    page = Page(report(Reader(locate(database))))
    said = " ".join(data for _, data in page.texts)
    assert "an H100" in said
    assert "1.50x" in said
    assert "1.47 to 1.53" in said
    assert "1.45x in a fresh process" in said
    assert "wrong_result" in said
    assert "off by 3" in said
    assert "no answer after 30 s" in said
    assert "block_q=112" in said
    assert "13 configs tried, 2 rejected" in said
    assert len(page.all("svg", "convergence")) == 4
    assert len(page.all("svg", "parallel")) == 4
    assert len(page.all("svg", "gain")) == 4
    assert len(page.all("tr", "fastest")) == 1


def test_it_loads_nothing_and_runs_nothing_of_the_database(database):
    change(database, "UPDATE kernel SET name = ?", f"kernel {stored.HOSTILE}")
    change(database, "UPDATE best SET kernel_name = kernel_name || ?", stored.HOSTILE)
    change(database, "UPDATE best SET source = ?, policy = policy || ?", *2 * [stored.HOSTILE])
    change(database, "UPDATE measurement SET status = ? WHERE status != 'ok'", stored.HOSTILE)
    hostile = '{"</svg><script>alert(2)</script>": 1, "b\\"> <img src=x onerror=alert(3)>": true}'
    change(database, "UPDATE config SET params_json = ? WHERE id % 3 = 0", hostile)
    page = Page(report(Reader(locate(database))))
    assert len(page.all("script")) == 1
    assert page.all("img") == page.all("iframe") == []
    for _, attributes in page.elements:
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    styles = [data for tag, data in page.texts if tag == "style"]
    assert not re.search(r"url\(|@import", "".join(styles))
    anchors = {one["id"] for _, one in page.elements if "id" in one}
    assert {one["href"][1:] for one in page.all("a")} <= anchors


def test_only_what_matches(database):
    reader = Reader(locate(database))
    assert len(Page(report(reader, device="H100")).all("svg", "convergence")) == 2
    assert len(Page(report(reader, kernel="sm90")).all("svg", "convergence")) == 1
    assert len(Page(report(reader, problem="band")).all("svg", "convergence")) == 1
    assert "Nothing is stored" in report(reader, problem="no such")


def test_it_only_reads(database):
    before = database.read_bytes()
    reader = Reader(locate(database))
    report(reader)
    with pytest.raises(TuningError, match="attempt to write a readonly"):
        reader.rows(sqlalchemy.text("DELETE FROM best"))
    assert database.read_bytes() == before
    with pytest.raises(TuningError, match="there is no tuning database"):
        Reader(locate(database.with_name("absent.db")))
    assert not database.with_name("absent.db").exists()
    for name in ("none", "http://localhost:1"):
        with pytest.raises(TuningError, match="name an SQLite file"):
            Reader(locate(name))


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE measurement SET median_ns = 'x', error_text = 7 WHERE id % 2",
        "UPDATE measurement SET median_ns = -5",
        "UPDATE measurement SET status = NULL, created_us = 'soon'",
        "UPDATE config SET params_json = '[1' WHERE id % 2",
        "UPDATE config SET params_json = '{\"a\": [1]}'",
        "UPDATE best SET median_ns = 0, ci95_lo = 'low'",
        "UPDATE best SET updated_us = 4611686018427387903",
        "UPDATE best SET ci95_lo = 0, ci95_hi = 4000000000000000000",
        "UPDATE device SET sm_count = 'many', name = x'00ff'",
        "UPDATE problem SET hq = 'h', causal = 7",
        "DELETE FROM config",
        "DELETE FROM measurement",
    ],
)
def test_rows_that_make_no_sense_are_left_out(database, damage):
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA foreign_keys=OFF")
        connection.execute("PRAGMA ignore_check_constraints=ON")
        connection.executescript("PRAGMA writable_schema=ON")
        # NOT NULL goes, as in a file that somebody else made.
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '')")
        connection.commit()
    change(database, damage)
    Page(report(Reader(locate(database))))


def test_a_database_of_the_first_schema_is_read_as_it_is(database):
    import alembic.command

    from portattn.tuning_db.engine import migrating, migration_config

    store = Store(database)
    with migrating(store.engine) as connection:
        alembic.command.downgrade(migration_config(connection), "0001")
    store.engine.dispose()
    assert "1.50x" in report(Reader(locate(database)))
    change(database, "UPDATE portattn_version SET version_num = '9999'")
    with pytest.raises(TuningError, match="Upgrade portattn"):
        Reader(locate(database))


def test_a_server_is_read_too(postgresql):
    url = postgresql.database()
    store = Store(url)
    stored.fill(store)
    reader = Reader(locate(url))
    assert "1.50x" in report(reader)
    with pytest.raises(TuningError, match="read-only"):
        reader.rows(sqlalchemy.text("DELETE FROM best"))
    store.engine.dispose()
    reader.close()


def test_a_view_that_never_ends_is_given_up(database, monkeypatch):
    monkeypatch.setattr("portattn.report.reader.SECONDS", 0.2)
    change(database, "ALTER TABLE best RENAME TO hidden")
    endless = (
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT * FROM n, hidden"
    )
    change(database, f"CREATE VIEW best AS {endless}")
    with pytest.raises(TuningError, match="interrupted"):
        report(Reader(locate(database)))


def test_damaged_files_are_errors_that_say_so(database):
    noise, good = random.Random(3), database.read_bytes()
    outcomes = set()
    for _ in range(40):
        damaged = bytearray(good[: noise.choice((len(good), noise.randrange(len(good))))])
        for _ in range(noise.choice((1, 30, 300))):
            damaged[noise.randrange(len(damaged))] = noise.randrange(256)
        database.write_bytes(damaged)
        try:
            report(Reader(locate(database)))
            outcomes.add("read")
        except TuningError as error:
            outcomes.add("refused" if "cannot be used" in str(error) else str(error))
    assert outcomes == {"read", "refused"}


def attempt(params, median_ns):
    return Attempt(params, "ok" if median_ns else "crash", median_ns, "")


def test_charts_of_little():
    failed = Course("k", "p", (attempt({"a": 1}, None),), 0)
    assert charts.convergence(failed) == charts.parallel(failed) == ""
    assert failed.default_ns is None
    one = Course("k", "p", (attempt({"a": 1}, 5),), 0)
    assert "svg" in charts.convergence(one)
    assert charts.parallel(one) == ""
    same = Course("k", "p", tuple(attempt({"a": 1 + i, "b": "x"}, 5) for i in range(3)), 0)
    Page(charts.convergence(same))
    page = Page(charts.parallel(same))
    assert len(page.all("path", "line")) == 3
    names = [data for tag, data in page.texts if tag == "text"]
    assert "a" in names
    assert "b" not in names  # it does not vary
    many = Course("k", "p", tuple(attempt({"a": i}, 100 + i) for i in range(5000)), 0)
    assert len(Page(charts.parallel(many)).all("path", "line")) <= charts.MAX_LINES + 1


def test_times_for_people():
    said = [text.duration(one) for one in (5, 1234, 999_999, 12_345_678, 2_000_000_000_000)]
    assert said == ["5 ns", "1.23 us", "1000 us", "12.3 ms", "2000 s"]
    assert text.instant(0) == text.instant(2**62) == ""
    assert text.instant(1_700_000_000_000_000) == "2023-11-14 22:13 UTC"


def test_the_command(database, tmp_path, monkeypatch, capsys):
    from portattn import cli

    monkeypatch.setenv("PORTATTN_DB", str(database))
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path / "out.html")])
    assert not ended.value.code
    assert "wrote" in capsys.readouterr().out
    assert "an H100" in (tmp_path / "out.html").read_text()
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path / "no" / "out.html")])
    assert ended.value.code == 1
    assert "cannot be written" in capsys.readouterr().err
