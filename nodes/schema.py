"""What the nodes' schemas have in common."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

Concepts = io.Custom("ITERIS_CONCEPTS")
Scorer = io.Custom("ITERIS_SCORER")
LoraModel = io.Custom("LORA_MODEL")
LoraStack = io.Custom("LORA_STACK")


def advanced(*inputs: Any) -> list[Any]:
    """Inputs that the front end folds away; 0.3.64's do not take that when they are made."""
    for shown in inputs:
        shown.extra_dict = {**shown.extra_dict, "advanced": True}
    return list(inputs)


def schema(node_id: str, display_name: str, aliases: list[str], **fields: Any) -> io.Schema:
    """A schema in our category; ``aliases`` are for the search of versions that know them."""
    if "search_aliases" in io.Schema.__dataclass_fields__:
        fields["search_aliases"] = aliases
    return io.Schema(node_id=node_id, display_name=display_name, category="IterIS", **fields)
