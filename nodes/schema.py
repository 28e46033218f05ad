"""Types, inputs and texts that the nodes' schemas share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from comfy_api.latest import io

_LOCALES = Path(__file__).parents[1] / "locales"
_TEXTS = json.loads((_LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8"))

Concepts = io.Custom("ITERIS_CONCEPTS")
MergeSettings = io.Custom("ITERIS_SETTINGS")
Scorer = io.Custom("ITERIS_SCORER")
LoraModel = io.Custom("LORA_MODEL")
LoraStack = io.Custom("LORA_STACK")


def concepts_input(*, optional: bool = False) -> Any:
    """Takes what our nodes say is merged, and LORA_STACKs of other packs."""
    types = [Concepts, LoraStack]
    return io.MultiType.Input("concepts", types=types, optional=optional)


def concepts_output() -> Any:
    return Concepts.Output(display_name="concepts")


def strength_input(name: str, **more: Any) -> Any:
    return io.Float.Input(name, **{"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05, **more})


def weight_input(name: str = "weight", **more: Any) -> Any:
    return io.Float.Input(name, **{"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.05, **more})


def advanced(*inputs: Any) -> list[Any]:
    """Inputs that the front end folds away; 0.3.64's do not take that when they are made."""
    for one in inputs:
        one.extra_dict = {**one.extra_dict, "advanced": True}
    return list(inputs)


def schema(
    node_id: str,
    display_name: str,
    aliases: list[str],
    inputs: list[Any],
    outputs: list[Any],
    group: str = "",
    **more: Any,
) -> io.Schema:
    """A schema in our category, or its ``group``; ``aliases`` are for the search of versions that
    know them.

    What it says comes from ``locales/en``, but for tooltips that are made from what settings and
    methods declare.
    """
    texts = _TEXTS[node_id]
    for one in inputs:
        first = re.sub(r"_\d+$", "_1", one.id)  # of the rows of a node
        one.tooltip = one.tooltip or texts["inputs"][first]["tooltip"]
    for number, one in enumerate(outputs):
        one.tooltip = texts["outputs"][str(number)]["tooltip"]
    if "search_aliases" in io.Schema.__dataclass_fields__:
        more["search_aliases"] = aliases
    return io.Schema(
        node_id=node_id,
        display_name=display_name,
        category=f"IterIS/{group}".rstrip("/"),
        description=texts["description"],
        inputs=inputs,
        outputs=outputs,
        **more,
    )
