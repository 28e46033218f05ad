"""Code that authors publish, out of checkouts: ``AUTHORS_PATH`` names a folder that has them by
their repositories' names. Nothing of it stands here."""

from __future__ import annotations
import __future__

import ast
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from oracle import SITES, difference

from iteris_core import Lora

LINEAR = [site for site in SITES if site != "conv"]  # what most of that code merges


def checkout(repository: str) -> Path:
    """The folder of ``repository``; ``SSR_MERGE_PATH`` may name that of SSR-Merge."""
    own = os.environ.get("SSR_MERGE_PATH") if repository == "SSR-Merge" else None
    return Path(own or Path(os.environ.get("AUTHORS_PATH", "/nowhere")) / repository)


def needs(file: str) -> pytest.MarkDecorator:
    """A test that is skipped where there is no ``file``, REPOSITORY/PATH."""
    repository, _, path = file.partition("/")
    return pytest.mark.skipif(
        not (checkout(repository) / path).is_file(),
        reason=f"AUTHORS_PATH names no folder with a checkout of {repository}",
    )


def taken(file: str, *names: str, **given: Any) -> dict[str, Any]:
    """The functions and classes ``names`` of ``file``, REPOSITORY/PATH; all, if none is named.

    Its imports are not run: the code finds what is ``given``. Annotations are not evaluated.
    """
    repository, _, path = file.partition("/")
    source = checkout(repository) / path
    tree = ast.parse(source.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    tree.body = [n for n in tree.body if isinstance(n, kinds) and (not names or n.name in names)]
    flags = __future__.annotations.compiler_flag
    space = {"__name__": source.stem, **given}
    exec(compile(tree, str(source), "exec", flags, dont_inherit=True), space)
    return {name: value for name, value in space.items() if name != "__builtins__"}


def quiet(steps: Iterable[Any], **_: Any) -> Iterable[Any]:
    """tqdm without its bar"""
    return steps


def off(ours: Any, wanted: Any) -> float:
    """The largest relative distance of a merge, or its LoRA, over the sites of ``wanted``."""
    sites = getattr(ours, "lora", ours).sites
    return difference(Lora({site: sites[site] for site in wanted}), wanted)
