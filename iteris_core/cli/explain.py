"""``iteris explain``"""

from __future__ import annotations

import re
from typing import Annotated

import typer

from ..errors import KINDS, IterisError, UsageError, remedy_of
from .common import option

_PAGE = """\
# Index of errors

Written by `iteris explain --markdown`, not by hand. Every message of `iteris` ends with a code,
such as `[IT-09]`; `iteris explain IT-09` prints its entry. In Python the class is
`iteris_core.errors.NAME`. All are derived from `IterisError`.
"""


def explain(
    code: Annotated[
        str | None, typer.Argument(help="What a message ends with, such as IT-09; all without it")
    ] = None,
    markdown: Annotated[
        bool, option("All of it as the page docs/errors/index.md", "--markdown")
    ] = False,
) -> None:
    """Say what an error means and what to do."""
    if markdown:
        typer.echo(errors_page(), nl=False)
        return
    codes = {kind.code: kind for kind in KINDS}
    if code is None:
        for name, kind in codes.items():
            typer.echo(f"{name}  {_what(kind)}")
        return
    number = re.fullmatch(r"\[?(?:IT-?)?(\d+)\]?", code.strip().upper())
    name = f"IT-{int(number[1]):02d}" if number is not None else code
    if name not in codes:
        raise UsageError(f"There is no error {code!r}; the codes are {', '.join(codes)}.")
    remedy = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", remedy_of(codes[name])).replace("`", "")
    typer.echo(f"{name}  {_what(codes[name])}\n{remedy}")


def errors_page() -> str:
    """``docs/errors/index.md``."""
    entries = [f"## {k.code}\n\n`{k.__name__}`: {_what(k)}\n\n{remedy_of(k)}\n" for k in KINDS]
    return "\n".join([_PAGE, *entries])


def _what(kind: type[IterisError]) -> str:
    return (kind.__doc__ or "").partition("\n\n")[0]
