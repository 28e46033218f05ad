"""What the nodes' schemas have in common."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

Concepts = io.Custom("ITERIS_CONCEPTS")
MergeSettings = io.Custom("ITERIS_SETTINGS")
Scorer = io.Custom("ITERIS_SCORER")
LoraModel = io.Custom("LORA_MODEL")
LoraStack = io.Custom("LORA_STACK")


def concepts_input(tooltip: str, *, optional: bool = False) -> Any:
    """Takes what our nodes say is merged, and LORA_STACKs of other packs."""
    types = [Concepts, LoraStack]
    return io.MultiType.Input("concepts", types=types, optional=optional, tooltip=tooltip)


def concepts_output() -> Any:
    return Concepts.Output(
        display_name="concepts", tooltip="For the next concept node, or for IterIS Merge."
    )


def strength_input(name: str, tooltip: str, **more: Any) -> Any:
    return _number(name, -10.0, 10.0, tooltip, more)


def weight_input(tooltip: str, name: str = "weight", default: float = 1.0, **more: Any) -> Any:
    return _number(name, 0.0, 100.0, tooltip, {"default": default, **more})


def _number(name: str, low: float, high: float, tooltip: str, more: dict[str, Any]) -> Any:
    given = {"default": 1.0, "min": low, "max": high, "step": 0.05, "tooltip": tooltip, **more}
    return io.Float.Input(name, **given)


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
