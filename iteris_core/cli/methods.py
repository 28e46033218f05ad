"""``iteris methods``"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ..concepts import Calibration
from ..methods import all_methods, find_method
from ..presets import PRESETS
from ..settings import Setting, Settings, declared_settings
from .common import option, print_table


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
    if method is not None:
        chosen = find_method(method)
        print_table(_HEADINGS, _rows(chosen.settings), f"{method}: {chosen.summary}")
        return
    rows = [
        (one.name, one.summary, _values(asdict(one.settings())), "yes" if one.needs_host else "no")
        for one in all_methods()
    ]
    print_table(("method", "what it does", "settings", "runs the base"), rows)
    print_table(_HEADINGS, _rows(Calibration), "calibration, of all that run the base")
    print_table(("preset", "what it is"), [(name, one.help) for name, one in PRESETS.items()])


_HEADINGS = ("setting", "default", "values", "what it is")


def _rows(owner: type[Settings]) -> list[tuple[str, ...]]:
    return [
        (one.name, one.shown(one.default), one.allowed(), one.explained())
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
    written = Setting("").shown
    return ", ".join(f"{name}={written(value)}" for name, value in values.items())


def _markdown(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ("---",) * len(headings), *rows)]
