"""Seeds: configs that ship with the package, as reviewed text.

README.md beside this file has the format.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from typing import TYPE_CHECKING

from portattn.tuning_db.key import BUCKET_VERSION, ProblemKey
from portattn.tuning_db.snapshot import StoredConfig, check_params, key_from_values

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMAT = "portattn-seeds"
VERSION = 1
MAX_BYTES = 4 << 20
_KEY_NAMES = tuple(field.name for field in dataclasses.fields(ProblemKey))


def parse(text: str) -> tuple[StoredConfig, ...]:
    """The entries of one seeds file, those of other bucket versions left out.

    Raises:
        ValueError: the text is not a seeds file of this version.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"a seeds file has at most {MAX_BYTES} bytes")
    content = json.loads(text)
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or content.get("version") != VERSION
    ):
        raise ValueError(f"not a {FORMAT} file of version {VERSION}")
    family, entries = content.get("family"), content.get("entries")
    if not isinstance(family, str) or not isinstance(entries, list):
        raise ValueError("needs a string 'family' and a list 'entries'")
    rows = (_entry(family, entry) for entry in entries)
    return tuple(row for row in rows if row.key.bucket_version == BUCKET_VERSION)


def _entry(family: str, entry: object) -> StoredConfig:
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("kernel"), str)
        or not isinstance(entry.get("problem"), dict)
    ):
        raise ValueError("an entry needs 'kernel', 'problem' and 'config'")
    problem = entry["problem"]
    if set(problem) != set(_KEY_NAMES):
        raise ValueError(f"an entry's problem needs exactly the fields {', '.join(_KEY_NAMES)}")
    key = key_from_values([problem[name] for name in _KEY_NAMES])
    texts = [entry.get(name, "") for name in ("backend", "source", "toolchain", "device")]
    times = [entry.get(name, 0) for name in ("median_ns", "default_ns")]
    if not all(type(text) is str for text in texts):
        raise ValueError("backend, source, toolchain and device must be strings")
    if not all(type(time_ns) is int and 0 <= time_ns < 2**62 for time_ns in times):
        raise ValueError("median_ns and default_ns must be integers that are not negative")
    backend, source, toolchain, device = texts
    return StoredConfig(
        kernel_name=entry["kernel"],
        backend=backend,
        key=key,
        params=check_params(entry.get("config")),
        family=family,
        device_name=device,
        source_sha256=source,
        toolchain_class=toolchain,
        median_ns=times[0],
        default_ns=times[1],
    )


def dump(family: str, rows: Iterable[StoredConfig]) -> str:
    """The text of a seeds file with these rows: the same rows, the same text."""
    entries = [
        {
            "kernel": row.kernel_name,
            "backend": row.backend,
            "problem": dataclasses.asdict(row.key),
            "config": row.params,
            "median_ns": row.median_ns,
            "default_ns": row.default_ns,
            "source": row.source_sha256,
            "toolchain": row.toolchain_class,
            "device": row.device_name,
        }
        for row in rows
        if row.family == family
    ]
    entries.sort(key=lambda entry: json.dumps(entry, sort_keys=True))
    # One entry a line: a diff shows which problem's config changed.
    lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in entries)
    head = json.dumps({"format": FORMAT, "version": VERSION, "family": family})
    return f'{head[:-1]}, "entries": [\n{lines}\n]}}\n'


def load_all() -> tuple[tuple[StoredConfig, ...], list[str]]:
    """Every shipped seed, and what was wrong with files that could not be used."""
    rows: list[StoredConfig] = []
    problems: list[str] = []
    folder = importlib.resources.files("portattn.tuning_db.seeds")
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".json"):
            continue
        try:
            rows += parse(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            problems.append(f"{file.name}: {str(error)[:200]}")
    return tuple(rows), problems
