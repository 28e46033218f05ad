"""The command line ``iteris``; one file a command."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich.markup import escape

from ..errors import IterisError
from .common import console
from .compare import compare
from .demo import demo
from .doctor import PACKAGE, doctor, version_of
from .help import Command
from .init import init
from .inspect import inspect
from .merge import merge
from .methods import methods
from .score import score

_HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_HELP,
)
for command in (merge, init, inspect, compare, score, methods, demo, doctor):
    app.command(cls=Command, context_settings=_HELP)(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"iteris {version_of(PACKAGE) or 'from a checkout'}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Merge several LoRAs into one by least squares on what the merged model really sees."""


def main() -> None:
    """Run the command line; an :class:`IterisError` is one line and exit status 2."""
    logging.basicConfig(level=logging.WARNING)
    try:
        app()
    except IterisError as error:
        console.print(f"[bold red]iteris:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
