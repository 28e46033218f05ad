"""Sphinx's roles in docstrings, as in ``:class:`Concept```, become code on the site's pages."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|data|attr|mod):`~?\.*([\w.]+)`")


class Roles(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_code, obj.docstring.value.replace("``", "`"))


def _code(role: re.Match[str]) -> str:
    return f"`{role[1].rpartition('.')[2]}`"
