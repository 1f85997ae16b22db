"""Where the database is: what ``PORTATTN_DB`` names, or a file in the user's data directory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

ENVIRONMENT_VARIABLE = "PORTATTN_DB"
NO_DATABASE = "none"

# File systems on which SQLite's WAL (shared memory between processes) is not safe.
_NETWORK_TYPES = frozenset(
    (
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "lustre",
        "gpfs",
        "beegfs",
        "ceph",
        "afs",
        "fuse.sshfs",
        "fuse.glusterfs",
    )
)


class TuningDatabaseWarning(UserWarning):
    """The tuning database, or some rows of it, cannot be used; default configs run instead."""


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """Where the tuning database is.

    Attributes:
        url: an SQLAlchemy URL; "" if there is to be no database.
        path: the file of an SQLite database; None for other databases.
        named: the caller or PORTATTN_DB named it; False for the default file.
    """

    url: str
    path: Path | None
    named: bool

    @property
    def is_http(self) -> bool:
        """Whether it is a server of `portattn serve`, which is read only."""
        return self.url.startswith(("http://", "https://"))

    @property
    def shown(self) -> str:
        """The file or URL for people to read, without a password."""
        if self.path is not None or not self.url:
            return str(self.path or "none")
        scheme, _, rest = self.url.partition("://")
        credentials, at, host = rest.rpartition("@")
        user = credentials.partition(":")[0]
        return f"{scheme}://{user}:***{at}{host}" if ":" in credentials else self.url


def default_path() -> Path:
    """The default database file, in the user's data directory."""
    import platformdirs

    return Path(platformdirs.user_data_dir("portattn", appauthor=False)) / "tuning.db"


def locate(database: str | os.PathLike[str] | None = None) -> Location:
    """The database to use.

    Args:
        database: an SQLAlchemy URL, the path of an SQLite file, the ``http://`` address of a
            `portattn serve`, or ``"none"`` to have no database; None takes ``PORTATTN_DB``, or
            else the default.
    """
    text = (
        os.fspath(database) if database is not None else os.environ.get(ENVIRONMENT_VARIABLE, "")
    )
    if not text:
        path = default_path()
        return Location(f"sqlite:///{path}", path, named=False)
    if text == NO_DATABASE:
        return Location("", None, named=True)
    if "://" not in text:
        path = Path(text).expanduser().absolute()
        return Location(f"sqlite:///{path}", path, named=True)
    scheme, _, rest = text.partition("://")
    if scheme.partition("+")[0] != "sqlite":
        return Location(text, None, named=True)
    path = Path(rest.removeprefix("/")).absolute()  # sqlite:///relative, sqlite:////absolute
    return Location(f"sqlite:///{path}", path, named=True)


def network_file_system(path: Path, mounts: str | None = None) -> str | None:
    """The type of the network file system that holds the path; None if it is local or not known.

    Args:
        path: an absolute path; need not exist.
        mounts: the text of /proc/self/mounts; None reads it (where there is none, nothing is
            known).
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
    best, best_type = "", ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        inside = path.is_relative_to(point)
        if inside and len(point) >= len(best):
            best, best_type = point, fields[2]
    return best_type if best_type in _NETWORK_TYPES else None
