"""What the pages of the API list says what its arguments are."""

import importlib
import inspect
import re
from pathlib import Path

PAGES = sorted((Path(__file__).parents[2] / "docs" / "api").glob("*.md"))


def listed():
    """(object, the members that its page shows; None: all)"""
    for page in PAGES:
        for block in re.split(r"^::: ", page.read_text(encoding="utf-8"), flags=re.M)[1:]:
            path, _, options = block.partition("\n")
            chosen = re.search(r"members: (false|\[.*\])", options)
            yield resolved(path.strip()), chosen and re.findall(r"\w+", chosen[1])


def resolved(path):
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ImportError:
        return getattr(importlib.import_module(module), name)


def functions(thing, members):
    if inspect.isfunction(thing):
        yield thing
        return
    module = thing.__name__ if inspect.ismodule(thing) else thing.__module__
    for name, value in vars(thing).items():
        if name.startswith("_") or (members is not None and name not in members):
            continue
        value = getattr(value, "__func__", value)  # of a class method
        if getattr(value, "__module__", None) != module:
            continue
        if inspect.isfunction(value):
            yield value
        elif inspect.isclass(value) and inspect.ismodule(thing):
            yield from functions(value, None)


def test_docstrings_name_every_argument():
    found = [function for thing, members in listed() for function in functions(thing, members)]
    assert len(found) > 50
    lacking = {}
    for function in found:
        text = inspect.getdoc(function) or ""
        names = set(inspect.signature(function).parameters) - {"self", "cls"}
        if silent := [name for name in names if not re.search(rf"\b{name}\b", text)] or not text:
            lacking[function.__qualname__] = silent
    assert not lacking
