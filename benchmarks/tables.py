"""The tables of the pages from the JSON in ``results/``, each between two marks of its page.

``python benchmarks/tables.py`` prints every table, ``--write`` puts each into its place and
``--check`` fails, and names them, where a page says otherwise than its JSON. A place is a line
``<!-- table NAME -->`` and a line ``<!-- end -->``, with what is between them; indented marks have
an indented table.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from machine_tables import TABLES as MACHINE
from new_words_tables import TABLES as NEW_WORDS
from outputs import ROOT
from tool_tables import TABLES as TOOLS
from use_tables import TABLES as USE
from verdict_tables import TABLES as VERDICTS

TABLES: Mapping[str, Callable[[], list[str]]] = {
    **NEW_WORDS,
    **USE,
    **TOOLS,
    **MACHINE,
    **VERDICTS,
}
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    ROOT / "toybox" / "README.md",
)
_PLACE = re.compile(
    r"^(?P<indent> *)<!-- table (?P<name>.+?) -->\n(?P<table>.*?)^ *<!-- end -->$",
    re.MULTILINE | re.DOTALL,
)


def rewritten(text: str) -> tuple[str, list[str]]:
    """A page with its tables as they should be, and the names of those that were otherwise."""
    stale: list[str] = []

    def place(found: re.Match[str]) -> str:
        indent, name = found["indent"], found["name"]
        table = "".join(f"{indent}{line}\n" for line in TABLES[name]())
        if table != found["table"]:
            stale.append(name)
        return f"{indent}<!-- table {name} -->\n{table}{indent}<!-- end -->"

    return _PLACE.sub(place, text), stale


def outside(text: str) -> str:
    """A page without its places."""
    return _PLACE.sub("", text)


def renew(pages: tuple[Path, ...] = PAGES, *, write: bool) -> list[str]:
    """The tables, and their pages, that were not as their JSON says."""
    found: list[str] = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        new, stale = rewritten(text)
        found += [f"{page.relative_to(ROOT)}: {name}" for name in stale]
        if write and new != text:
            page.write_text(new, encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(TABLES))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.write or arguments.check:
        stale = renew(write=arguments.write)
        print("\n".join(stale))
        raise SystemExit(bool(stale) and arguments.check)
    for name in arguments.names or TABLES:
        print(f"{name}\n", *TABLES[name](), "", sep="\n")


if __name__ == "__main__":
    main()
