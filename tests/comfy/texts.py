"""English texts of the nodes, as their schemas have them: ``locales/en`` and the help pages.

``COMFYUI_PATH=… pytest tests/comfy/test_texts.py`` holds the files against them; with
``WRITE_TEXTS=1`` it writes them. Other languages are translated by hand.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any


def schemas(pack: ModuleType) -> list[Any]:
    nodes = importlib.import_module(f"{pack.__name__}.nodes")
    return [node.define_schema() for node in nodes.NODES]


def english(pack: ModuleType) -> dict[str, Any]:
    """``locales/en/nodeDefs.json``"""
    return {
        schema.node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {i.id: {"name": i.id, "tooltip": i.tooltip} for i in schema.inputs},
            "outputs": {
                str(index): {"name": output.display_name, "tooltip": output.tooltip}
                for index, output in enumerate(schema.outputs)
            },
        }
        for schema in schemas(pack)
    }


def with_tables(page: str, texts: Mapping[str, Any]) -> str:
    """A help page with the tables of inputs and outputs that ``texts`` say."""
    for part, heading in (("inputs", "input"), ("outputs", "output")):
        rows = [f"| `{t['name']}` | {t['tooltip']} |" for t in texts[part].values()]
        table = "\n".join([f"| {heading} | what it is |", "|---|---|", *rows, ""])
        page = re.sub(rf"\| {heading} \| what it is \|\n(\|.*\n)*", lambda _, t=table: t, page)
    return page
