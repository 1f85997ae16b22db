"""Ways to spoil a tuning database and the texts that portattn reads; by chance, but repeatably."""

import contextlib
import json
import random
import sqlite3
from pathlib import Path


def _payloads(canary: Path) -> list[object]:
    """Values that no column holds; whatever runs them leaves the canary."""
    touch = f"__import__('pathlib').Path('{canary}').touch()"
    return [
        *(0, -1, 1, 2**31, 2**62, 2**63 - 1, -(2**63), 1e308, -1e-320, float("inf"), None, True),
        *("", " ", "NaN", "1e999", "9" * 400, "\ud7ff\uffff", "\x1b[31m", "a" * 70_000),
        *(touch, "import os", f"!!python/object/apply:os.system ['touch {canary}']"),
        f"c__builtin__\neval\n(S'{touch}'\ntR.",
        *("'; DROP TABLE best; --", "1; DELETE FROM config", "x' OR '1'='1", "%s %(a)s :a ?"),
        f"'; ATTACH DATABASE '{canary}' AS stolen; CREATE TABLE stolen.t(x); --",
        *("../../../etc/passwd", "/dev/zero", "file:///etc/passwd", "\\\\host\\share", "C:\\nul"),
        *("portattn.errors", "os.system", "torch", "__class__", "<script>alert(1)</script>"),
        *('{"block_q": 1e400}', '{"block_q": NaN}', '{"block_q": [1]}', '{"block_q": "32"}'),
        *('{"block_q": 99999999999999999999}', '{"block_q": -5}', '{"__class__": "os"}', "[[[["),
        *('{"block_q": 1048576}', '{"block_q": 0}', '{"a": {"b": {}}}', "{", "null", "[]", "{}"),
        *("[" * 5_000, "0000", "9999", b"\x80\x04K\x01.", b"\x00" * 50, b"\xff\xfe", b""),
    ]


_SCHEMA_CHANGES = (
    "UPDATE portattn_version SET version_num = '0003'",
    "UPDATE portattn_version SET version_num = '../x'",
    "UPDATE portattn_version SET version_num = NULL",
    "INSERT INTO portattn_version VALUES ('9999')",
    "DELETE FROM portattn_version",
    "DROP TABLE portattn_version",
    "DROP TABLE best",
    "DROP TABLE config",
    "ALTER TABLE best RENAME COLUMN median_ns TO medium_ns",
    "ALTER TABLE config RENAME TO konfig",
    "ALTER TABLE device ADD COLUMN extra TEXT DEFAULT 'x'",
    "CREATE VIEW v AS SELECT load_extension('/tmp/x')",
    "CREATE TRIGGER t AFTER UPDATE ON run BEGIN SELECT load_extension('/tmp/x'); END",
    "CREATE TRIGGER t BEFORE INSERT ON run BEGIN SELECT RAISE(ABORT, 'no'); END",
    "CREATE TABLE alembic_version (version_num TEXT)",
    "PRAGMA user_version = 77",
    "PRAGMA application_id = 99",
    "PRAGMA encoding = 'UTF-16'",
    "PRAGMA journal_mode = DELETE",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = 'CREATE TABLE x(y)'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = 1 WHERE name = 'best'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET name = 'best' WHERE name = 'config'",
)
FILES = ("noise", "cut", "pages", "wal", "row", "rows", "schema")
_TABLES = ("best", "config", "device", "kernel", "problem", "toolchain", "measurement", "run")


class Spoiler:
    """Makes spoiled copies of a whole database, and spoiled texts.

    Args:
        whole: the file's bytes.
        canary: a file that appears if data is run as code.
    """

    def __init__(self, whole: bytes, canary: Path) -> None:
        self._whole = whole
        self._payloads = _payloads(canary)

    def file(self, kind: str, chance: random.Random, path: Path) -> None:
        """Write a spoiled database.

        Args:
            kind: of `FILES`.
            chance: decides everything else.
            path: where to.
        """
        getattr(self, f"_{kind}")(chance, path)

    def _noise(self, chance: random.Random, path: Path) -> None:
        data = bytearray(self._whole)
        begin = chance.choice((0, 0, chance.randrange(len(data))))
        end = min(len(data), begin + chance.choice((100, 4096, len(data))))
        for _ in range(chance.choice((1, 5, 50, 2000))):
            data[chance.randrange(begin, end)] = chance.randrange(256)
        path.write_bytes(data)

    def _cut(self, chance: random.Random, path: Path) -> None:
        whole = self._whole
        length = chance.choice((0, 1, 16, 100, 4096, chance.randrange(len(whole))))
        tail = chance.choice((b"", bytes(chance.randrange(5000)), whole[:length]))
        path.write_bytes(whole[:length] + tail)

    def _pages(self, chance: random.Random, path: Path) -> None:
        size = 4096
        pages = [self._whole[at : at + size] for at in range(0, len(self._whole), size)]
        for _ in range(chance.choice((1, 2, 10))):
            a, b = chance.randrange(len(pages)), chance.randrange(len(pages))
            pages[a] = chance.choice((pages[b], bytes(size), chance.randbytes(size)))
        path.write_bytes(b"".join(pages))

    def _wal(self, chance: random.Random, path: Path) -> None:
        path.write_bytes(self._whole)
        for end in chance.choice((("-wal",), ("-journal",), ("-wal", "-shm"), ("-shm",))):
            head = chance.choice(
                (b"", b"7\x7f\x06\x82\x00-\xe2\x18", b"\xd9\xd5\x05\xf9 \xa1c\xd7")
            )
            junk = head + chance.randbytes(chance.choice((0, 24, 5000)))
            path.with_name(path.name + end).write_bytes(junk)

    def _sql(self, path: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
        path.write_bytes(self._whole)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA ignore_check_constraints=ON")
            for sql, values in statements:
                for part in sql.split("; ") if not values else (sql,):
                    with contextlib.suppress(sqlite3.Error, UnicodeEncodeError):
                        connection.execute(part, values)
            with contextlib.suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _row(self, chance: random.Random, path: Path, count: int = 1) -> None:
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            connection.deserialize(self._whole.replace(b"\x02\x02", b"\x01\x01", 1))
            columns = {
                table: [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
                for table in _TABLES
            }
        statements = []
        for _ in range(count):
            table = chance.choice(_TABLES[:4] * 2 + _TABLES)
            column = chance.choice(columns[table])
            sql = f"UPDATE {table} SET {column} = ?"
            statements.append((sql, (chance.choice(self._payloads),)))
        self._sql(path, *statements)

    def _rows(self, chance: random.Random, path: Path) -> None:
        self._row(chance, path, chance.randrange(2, 8))

    def _schema(self, chance: random.Random, path: Path) -> None:
        self._sql(path, (chance.choice(_SCHEMA_CHANGES), ()))

    def text(self, chance: random.Random, text: str) -> str:
        begin = chance.randrange(len(text))
        end = chance.choice((begin, begin + chance.randrange(50), len(text)))
        middle = chance.choice(
            ("", chr(chance.randrange(0xD7FF)), "\0", "[" * 2000, "NaN", "1e999", text[:200])
        )
        return text[:begin] + middle + text[end:]

    def values(self, chance: random.Random, text: str) -> str:
        """Valid JSON with some values replaced, some fields added, lost or repeated."""
        content = json.loads(text)
        for _ in range(chance.choice((1, 1, 3))):
            parent, step = None, None
            node = content
            while isinstance(node, dict | list) and node and (not parent or chance.random() < 0.9):
                keys = list(node) if isinstance(node, dict) else range(len(node))
                parent, step = node, chance.choice(list(keys))
                node = node[step]
            if parent is None:
                continue
            payload = chance.choice(self._payloads)
            how = chance.randrange(5)
            if how == 0:
                del parent[step]
            elif how == 1 and isinstance(parent, dict):
                parent["extra"] = "x"
            elif how == 2 and isinstance(parent, list):
                parent.append(parent[step])
            else:
                parent[step] = payload if not isinstance(payload, bytes) else payload.hex()
        return json.dumps(content)
