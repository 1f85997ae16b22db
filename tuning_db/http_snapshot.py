"""The best rows of a `portattn serve`, read once for `lookup`; the whole takes at most seconds.

What comes back is data from elsewhere: bounded in size and time, and every value checked, as rows
of a database are.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

from portattn.tuning_db.key import BUCKET_VERSION
from portattn.tuning_db.snapshot import (
    COLUMNS,
    MAX_JSON_CHARS,
    MAX_ROWS,
    REVISIONS,
    Snapshot,
    rows_from,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BEST_PATH = "/v1/best"
SECONDS = 3.0
MAX_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 16
# Of the exchange format: where a column of `snapshot.COLUMNS` is found from a best row.
_TABLES = {"b": "best", "d": "device", "k": "kernel", "c": "config", "p": "problem"}
_FORMAT, _VERSION = "portattn-tuning", 1


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The address that the user named is the one that is asked."""

    def redirect_request(self, *_arguments: object) -> None:
        """None: what redirects is an error."""


def request_for(url: str) -> urllib.request.Request:
    """The request for the best rows of a server.

    Args:
        url: such as ``http://host:8765``; a query, e.g. ``?family=cuda-sm_90``, asks for less; a
            name and password, which a proxy before the server may want, are sent as such.
    """
    parts = urllib.parse.urlsplit(url)
    netloc = parts.netloc.rpartition("@")[2]
    path = parts.path.rstrip("/") + BEST_PATH
    address = urllib.parse.urlunsplit((parts.scheme, netloc, path, parts.query, ""))
    request = urllib.request.Request(address, headers={"Accept": "application/json"})
    if parts.username is not None:
        pair = ":".join(map(urllib.parse.unquote, (parts.username, parts.password or "")))
        request.add_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    return request


def _fetch(url: str) -> bytes:
    deadline = time.monotonic() + SECONDS
    chunks, size = [], 0
    opener = urllib.request.build_opener(_NoRedirect)
    with opener.open(request_for(url), timeout=SECONDS) as response:
        while chunk := response.read1(_CHUNK_BYTES):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_BYTES:
                raise ValueError(f"it sends more than {MAX_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"it takes more than {SECONDS:g} s")
    return b"".join(chunks)


def _values(tables: dict[str, Any]) -> Iterator[Sequence[Any]]:
    """Of each best row of this version's buckets the values that `snapshot.rows_from` takes."""
    best = tables["best"]
    if len(best) > MAX_ROWS:
        raise ValueError(f"it has more than {MAX_ROWS} rows")
    for row in best:
        config = tables["config"][row["config_id"]]
        found = {
            "best": {**row, "source": "import"},
            "device": tables["device"][row["device_id"]],
            "kernel": tables["kernel"][config["kernel_id"]],
            "config": config,
            "problem": tables["problem"][row["problem_id"]],
        }
        if found["problem"]["bucket_version"] != BUCKET_VERSION:
            continue
        if len(config["params_json"]) >= MAX_JSON_CHARS:
            continue
        yield [found[_TABLES[name[0]]][name[2:]] for name in COLUMNS]


def read(url: str) -> Snapshot:
    """Every valid best row of a server.

    Args:
        url: see `request_for`.

    Raises:
        Exception: what it sends is not what it should be; `snapshot.read` makes a state of it.
    """
    try:
        body = _fetch(url)
    except urllib.error.HTTPError as error:
        text = error.read(300).decode("utf-8", "replace")
        return Snapshot("unreadable", f"it answers with status {error.code}: {text}")
    except OSError as error:
        return Snapshot("unreachable", f"{type(error).__name__}: {str(error)[:200]}")
    content = json.loads(body)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return Snapshot("unreadable", "it does not answer as `portattn serve` does")
    if content.get("version") != _VERSION or content.get("schema") not in REVISIONS:
        return Snapshot("newer", "its format is of a newer portattn")
    return Snapshot("ok", "", *rows_from(_values(content["tables"])))
