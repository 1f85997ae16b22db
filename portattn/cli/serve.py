"""``portattn serve``: the tuning database over HTTP, read only."""

from __future__ import annotations

from typing import Annotated

import typer

MAX_CONNECTIONS = 64


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; one of another machine's reach is public.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8765,
    database: Annotated[
        str | None, typer.Option(help="File or SQLAlchemy URL instead of PORTATTN_DB.")
    ] = None,
) -> None:
    """Serve best configs as JSON, and a page with devices, gains and searches. Reads only.

    Machines without access to the database load it with PORTATTN_DB=http://HOST:PORT. Nobody is
    asked who they are: listen on other addresses only where everybody may read it.
    """
    from portattn.errors import TuningError

    try:
        import uvicorn

        from portattn.serve.app import build, is_loopback
    except ImportError as error:
        raise TuningError(
            f"portattn serve needs a package that is not installed ({error.name}): pip install "
            "'portattn[serve]'"
        ) from error
    import socket

    from portattn.report.reader import Reader
    from portattn.serve.app import LOCAL_NAMES
    from portattn.tuning_db.location import locate

    reader = Reader(locate(database))
    names = LOCAL_NAMES if is_loopback(host) else None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise TuningError(
            f"cannot listen on {host} port {port}: {error}. Choose others with --host and --port"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"http://{shown}:{listener.getsockname()[1]}/ serves {reader.location.shown}")
    config = uvicorn.Config(
        build(reader, names=names),
        log_level="warning",
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=5,
    )
    uvicorn.Server(config).run(sockets=[listener])
