"""``iteris explain``"""

from __future__ import annotations

import re
from typing import Annotated

import typer

from ..errors import KINDS, IterisError, UsageError
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
    codes = {kind.code: (one, kind) for one, kind in KINDS.items()}
    if code is None:
        for name, (one, _) in codes.items():
            typer.echo(f"{name}  {_what(one)}")
        return
    number = re.fullmatch(r"\[?(?:IT-?)?(\d+)\]?", code.strip().upper())
    name = f"IT-{int(number[1]):02d}" if number is not None else code
    if name not in codes:
        raise UsageError(f"There is no error {code!r}; the codes are {', '.join(codes)}.")
    one, kind = codes[name]
    remedy = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", kind.remedy).replace("`", "")
    typer.echo(f"{name}  {_what(one)}\n{remedy}")


def errors_page() -> str:
    """``docs/errors/index.md``."""
    parts = [_PAGE]
    for one, kind in KINDS.items():
        parts.append(f"## {kind.code}\n\n`{one.__name__}`: {_what(one)}\n\n{kind.remedy}\n")
    return "\n".join(parts)


def _what(one: type[IterisError]) -> str:
    return (one.__doc__ or "").partition("\n\n")[0]
