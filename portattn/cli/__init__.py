"""The ``portattn`` command.

Only the command that runs is imported: help stays fast, heavy packages wait for use.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

import typer

from portattn.errors import PortattnError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# command -> (module, function, one line of help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "tune": (
        "portattn.cli.tune",
        "tune",
        "Find the fastest config of every kernel on this machine and remember it.",
    ),
    "confirm": (
        "portattn.cli.confirm",
        "confirm",
        "Time every stored config beside the default again, in fresh processes.",
    ),
    "bench-search": (
        "portattn.cli.bench_search",
        "bench_search",
        "Compare the tuner's searches on recorded times, without the device.",
    ),
    "show": (
        "portattn.cli.show",
        "show",
        "Show what the tuning database holds: best configs against defaults.",
    ),
    "report": (
        "portattn.cli.report",
        "report",
        "Write an HTML file: gains, how they were found, what was rejected.",
    ),
    "serve": (
        "portattn.cli.serve",
        "serve",
        "Serve the tuning database over HTTP, read only, with a page to look at.",
    ),
    "doctor": (
        "portattn.cli.doctor",
        "doctor",
        "Say what works here, what is missing, and what a call would run.",
    ),
    "verify": (
        "portattn.cli.verify",
        "verify",
        "Compare every kernel with the float64 reference, case by case.",
    ),
    "bench": (
        "portattn.cli.bench",
        "bench",
        "Measure kernels beside SDPA, FlexAttention and flash-attn-4.",
    ),
    "demo": (
        "portattn.cli.demo",
        "demo",
        "Run a real model over a real text: tune, attend, compare, export.",
    ),
    "export": (
        "portattn.cli.export",
        "export",
        "Export a module that uses portattn's attention to ONNX.",
    ),
    "export-db": (
        "portattn.cli.database",
        "export_db",
        "Write the tuning database to a JSON file.",
    ),
    "import-db": (
        "portattn.cli.database",
        "import_db",
        "Merge an exported JSON file into the tuning database.",
    ),
}


def load(command: str) -> Callable[..., None]:
    """A command's function; imports its module."""
    module, function, _ = COMMANDS[command]
    loaded: Callable[..., None] = getattr(importlib.import_module(module), function)
    return loaded


def _only_listed() -> None:
    """Stands in the list of commands for one that this process does not run."""


def _version(is_asked: bool) -> None:
    if is_asked:
        from portattn import __version__

        typer.echo(f"portattn {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """One attention call; any mask; any device; the fastest kernel for that device."""


def build(command: str | None) -> typer.Typer:
    """The application in which one command can run and the others are listed; None only lists."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_root)
    for name, (_, _, text) in COMMANDS.items():
        if name == command:
            app.command(name)(load(name))
        else:
            app.command(name, help=text)(_only_listed)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exits with 0, with 1 on an error that the message explains, with 2 on wrong usage.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # What commands and their workers call is no workload: it is not counted as missed.
    os.environ["PORTATTN_MISSES"] = "off"
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        build(command if command in COMMANDS else None)(arguments, prog_name="portattn")
    except PortattnError as error:
        typer.echo(f"portattn: {error}", err=True)
        raise SystemExit(1) from error
