"""Digests of what a run was made with, so that rows of different code are not mixed.

The core's digest is of the files that a fixed set of merges writes
(``tests/merged_files.json``): a change of the code that keeps every merge keeps it. The world's is
of its weights and words, the protocol's of its sources but this one, without comments and
docstrings.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from outputs import ROOT

Digests = Mapping[str, str]
"""``core``, ``world`` and ``protocol`` → its digest"""

_MERGED = ROOT / "tests" / "merged_files.json"
_FAMILIES = ("sd1", "sdxl", "sd3", "flux")
_AS_BEFORE: Mapping[str, str] = {
    "44d0f65980ce": "f4e3abb9e7a9",  # the protocol without K-LoRA, rows of emoji and the search
    "ce9d96235ca4": "161c64f094fe",  # emoji without the LoRAs of styles
}
"""What draws and judges as an earlier state did, and keeps its digest: something else was taken out
or moved, and figures were held against kept rows."""
_DATA = (".safetensors", ".json", ".txt", ".png")


def digests_of(method: str, roots: Iterable[Path]) -> Digests:
    """Of ``method`` on a world whose files lie below ``roots``."""
    return {"core": core(method), "world": world(tuple(roots)), "protocol": protocol()}


@cache
def core(method: str) -> str:
    """Of what the method writes at its default settings; the same for all that is no method."""
    kept = json.loads(_MERGED.read_text(encoding="utf-8"))["merges"]
    names = [name for name in (method, *(f"{method}, {of}" for of in _FAMILIES)) if name in kept]
    return _digest(f"{name} {kept[name]['names']} {kept[name]['values']}" for name in names)


@cache
def world(roots: tuple[Path, ...]) -> str:
    """Of the files below ``roots``, of which each may be a file itself."""
    inside = {file for root in roots for file in root.rglob("*") if file.suffix in _DATA}
    return _digest(
        f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name} "
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}"
        for file in sorted(inside | {root for root in roots if root.is_file()})
    )


@cache
def protocol() -> str:
    files = sorted(file for file in Path(__file__).parent.glob("*.py") if file != Path(__file__))
    return _digest(ast.dump(_without_docstrings(file.read_text("utf-8"))) for file in files)


def _without_docstrings(source: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_text(one)]  # type: ignore[attr-defined]
    return tree


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _digest(lines: Iterable[str]) -> str:
    found = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    return _AS_BEFORE.get(found, found)
