"""``iteris methods``"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..concepts import Calibration
from ..methods import all_methods, find_method
from ..presets import PRESETS
from ..settings import Setting, Settings, declared_settings
from .common import option


def methods(
    method: Annotated[str | None, typer.Argument(help="Only this one, in full")] = None,
    markdown: Annotated[
        bool, option("All of it as the page docs/settings.md", "--markdown")
    ] = False,
) -> None:
    """List the merge methods, presets and settings."""
    if markdown:
        typer.echo(settings_page(), nl=False)
        return
    console = Console()
    if method is not None:
        chosen = find_method(method)
        console.print(_table(f"{method}: {chosen.summary}", chosen.settings))
        return
    table = Table("method", "what it does", "settings", "runs the base")
    for one in all_methods():
        settings = declared_settings(one.settings).values()
        values = ", ".join(f"{s.name}={s.shown(s.default)}" for s in settings)
        table.add_row(one.name, one.summary, values, "yes" if one.needs_host else "no")
    console.print(table)
    console.print(_table("calibration, of all that run the base", Calibration))
    presets = Table("preset", "what it is")
    for name, preset in PRESETS.items():
        presets.add_row(name, preset.help)
    console.print(presets)


_HEADINGS = ("setting", "default", "values", "what it is")


def _table(title: str, owner: type[Settings]) -> Table:
    table = Table(*_HEADINGS)
    table.title, table.title_justify = title, "left"
    for row in _rows(owner):
        table.add_row(*row)
    return table


def _rows(owner: type[Settings]) -> list[tuple[str, ...]]:
    return [
        (
            one.name,
            one.shown(one.default),
            one.allowed(),
            one.explained(),
        )
        for one in declared_settings(owner).values()
    ]


_PAGE = """\
# Settings

Written by `iteris methods --markdown`, not by hand. On the command line
`--set NAME=VALUE`, in Python `merge_loras(…, settings={"rank": 16}, calibration={"samples": 25})`.

## Presets

`--preset NAME`, or `merge_loras(…, preset="paper")`. Single settings go over it.
"""


def settings_page() -> str:
    """``docs/settings.md``; ``iteris methods --markdown`` writes it."""
    presets = [
        (f"`{name}`", preset.help, _values({**preset.settings, **preset.calibration}))
        for name, preset in PRESETS.items()
    ]
    lines = [_PAGE, *_markdown(("preset", "what it is", "settings"), presets)]
    lines += ["", "## Calibration: the rows on which features are collected", ""]
    lines += _markdown(_HEADINGS, _rows(Calibration))
    for method in all_methods():
        lines += ["", f"## `{method.name}`", "", method.summary, ""]
        lines += _markdown(_HEADINGS, _rows(method.settings))
    return "\n".join(lines) + "\n"


def _values(values: Mapping[str, Any]) -> str:
    shown = Setting("").shown
    return ", ".join(f"{name}={shown(value)}" for name, value in values.items())


def _markdown(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ("---",) * len(headings), *rows)]
