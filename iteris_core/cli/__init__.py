"""The command line ``iteris``; one file per command."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from ..errors import IterisError, UsageError
from .about import demo, explain, methods, store
from .common import console, spelled, warn
from .files import bake, convert, inspect
from .merge import merge
from .options import CONCEPT_FORMS, is_setting
from .resize import extract, resize
from .score import score

_HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    pretty_exceptions_enable=False,
    context_settings=_HELP,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,  # plain text for a pipe
)
for command in (
    *(merge, inspect, score, resize, extract, convert, bake),
    *(methods, explain, demo, store),
):
    forms = CONCEPT_FORMS if command is merge else None
    app.command(context_settings=_HELP, epilog=forms)(command)

_CANCELLED = 130
"""The exit status after Ctrl-C, which typer returns."""
_TyperError: Any = typer.BadParameter.__base__
"""Base of typer's errors for unknown or missing options and wrong values."""


def _version(show: bool) -> None:
    if show:
        try:
            typer.echo(f"iteris {importlib.metadata.version('iteris-lora')}")
        except importlib.metadata.PackageNotFoundError:
            typer.echo("iteris from a checkout")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Merge several LoRAs into one, by least squares on the inputs of the merged model."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


class _Warnings(logging.Handler):
    """Shows modules' warnings like the program's own."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(spelled(self.format(record)))


def main() -> None:
    """Run the command line; a mistake that the user can fix gives one line and exit status 2."""
    console.quiet = False
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Warnings()])
    try:
        status = app(standalone_mode=False)
        if status == _CANCELLED:
            keeps = sys.argv[1:2] == ["demo"]
            _stop(f"cancelled{'' if keeps else '; nothing was written'}.", status=_CANCELLED)
        sys.exit(status)
    except IterisError as error:
        _stop(spelled(str(error)), error.code)
    except _TyperError as error:
        where = error.ctx.command_path if error.ctx is not None else "iteris"
        message = error.format_message()
        name = getattr(error, "option_name", "").removeprefix("--").replace("-", "_")
        options = [] if error.ctx is None else error.ctx.command.params
        if is_setting(name) and any("--set" in option.opts for option in options):
            message = f"{name} is a setting of the method: --set {name}=VALUE"
        end = "" if message.endswith((".", "?")) else "."
        _stop(f"{message}{end} All options: {where} -h", UsageError.code)
    except typer.Abort:
        _stop("stopped; nothing was written.")
    except OSError as error:
        if error.filename is None:
            raise
        _stop(f"{error.filename}: {error.strerror}.")


def _stop(what: str, code: str = "", status: int = 2) -> NoReturn:
    """Exit with ``what`` on one line; ``iteris explain CODE`` has the details."""
    what = f"{what} [{code}]" if code else what
    console.quiet = False
    console.print(f"[bold red]iteris:[/] {escape(what)}", highlight=False, soft_wrap=True)
    sys.exit(status)
