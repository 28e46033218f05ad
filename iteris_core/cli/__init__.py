"""The command line ``iteris``; one file a command."""

from __future__ import annotations

import logging
import sys

import typer
from rich.markup import escape

from ..errors import IterisError
from .common import console
from .compare import compare
from .demo import demo
from .doctor import doctor
from .inspect import inspect
from .merge import merge
from .methods import methods
from .score import score

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Merge several LoRAs into one by least squares on what the merged model really sees.",
)
for command in (merge, inspect, compare, score, methods, demo, doctor):
    app.command()(command)


def main() -> None:
    """Run the command line; an :class:`IterisError` is one line and exit status 2."""
    logging.basicConfig(level=logging.WARNING)
    try:
        app()
    except IterisError as error:
        console.print(f"[bold red]iteris:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
