"""The pages are plain English: short sentences, and no translated phrases."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 35
"""Words of a sentence, outside of tables and code."""
PHRASES = re.compile(r"\b(?:is|are|was|were) (?:told|said|asked)\b(?! apart)")
PAGES = [
    ROOT / "README.md",
    ROOT / "AGENTS.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "web" / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*/README.md")),
    ROOT / "toybox" / "README.md",
]


def sentences(text: str) -> Iterator[str]:
    """Of running text and lists: no tables, headings, code or links' targets."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^ *(?:#|\|).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "CODE", text)
    for block in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", text, flags=re.MULTILINE):
        yield from re.split(r"(?<=[.!?:])\s+(?=[A-Z*\"(])", " ".join(block.split()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page):
    long = [text for text in sentences(page.read_text()) if len(text.split()) > LONGEST]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_told_or_said(page):
    """Subject, verb, object: the report lists it, the node shows it, the error names it."""
    assert not [text for text in sentences(page.read_text()) if PHRASES.search(text)]


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


def test_what_is_a_sentence():
    text = """# Title

Some `code is told` here. It is
long: [a link](x.md#y) follows, e.g. this.

| a table is told |
- One. Two are said.
```
it is said
```
"""
    assert list(filter(None, sentences(text))) == [
        "Some CODE here.", "It is long: a link follows, e.g. this.", "One.", "Two are said.",
    ]  # fmt: skip
