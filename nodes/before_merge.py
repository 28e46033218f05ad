"""What can be known of a merge before it runs: that it cannot be made, or that little may come of
it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import prod
from typing import Any

from torch import Tensor

from ..iteris_core.calibration import Calibration
from ..iteris_core.concepts import Concept
from ..iteris_core.config import MergeConfig
from ..iteris_core.errors import ConceptError
from ..iteris_core.methods import find_method
from .comfy_sizes import latent_shape
from .concept_specs import rows_of
from .kept import file_hash

MANY = 8
"""The most LoRAs of one merge that the tables of what to expect have."""
SMALL = 1 / 16
"""With less of the area that a merge chooses by itself, rows show little of what LoRAs do."""


def check(config: MergeConfig) -> None:
    """Raise :class:`ConceptError` if no LoRA is on, or if the method runs the model and none that
    it is to merge has words."""
    loras = [one for one in config.concepts if not one.preserves]
    on = [one for one in loras if one.is_active]
    if not on:
        zero = f" All of {rows_of(loras)} have strength or weight 0." if rows_of(loras) else ""
        raise ConceptError(
            f"No LoRA is on.{zero} On IterIS LoRAs press + LoRA, or the switch before a name; or "
            "connect a LORA_STACK as concepts."
        )
    own = [one for one in on if one.always_on == "no"]
    if not own or not find_method(config.method).needs_host:
        return
    if all(one.is_wordless for one in own):
        have = "have no trigger words" if len(own) > 1 else "has no trigger words"
        raise ConceptError(
            f"{_named(own)} {have}, so there is nothing to merge by: the LoRAs would only be added "
            "up. Type the words of each as words on IterIS LoRAs. Where a LoRA has none, set its "
            "prompts to always on; the method sum adds LoRAs up."
        )


def cautions(model: Any, latent: Tensor | None, config: MergeConfig) -> dict[str, str]:
    """What speaks against a merge, by what it is about: many LoRAs, a file that is there twice, and
    pictures that are too small."""
    found = about_loras(config.concepts)
    side = config.calibration.get("latent_size")
    if (latent is None and side is None) or not find_method(config.method).needs_host:
        return found
    whole = latent_shape(model, Calibration())
    size = (side, side) if latent is None else latent.shape[-2:]
    if len(whole) > 3 and prod(size) <= SMALL * prod(whole[-2:]):
        high, wide = size
        found["size"] = (
            f"Latents of {wide} × {high}, where a merge would choose {whole[-1]} × {whole[-2]}: on "
            "so small a picture little of a LoRA shows, and the merge will be weak. Connect a "
            "larger LATENT or none, and leave image_size at 0."
        )
    return found


def about_loras(concepts: Sequence[Concept]) -> dict[str, str]:
    """The part of :func:`cautions` that needs no model."""
    on = [one for one in concepts if one.file is not None and one.is_active]
    own, found = [one for one in on if one.always_on == "no"], dict[str, str]()
    if len(own) > MANY:
        found["LoRAs"] = (
            f"{len(own)} LoRAs: expect little of each. With {MANY}, half of the attributes were "
            "right in our tests, and more keep less. Turn off those that you do not draw with."
        )
    if twice := [_named(pair) for pair in combinations(on, 2) if _is_same(*pair)]:
        found["files"] = (
            f"{'; '.join(twice)} are the same file, which so counts twice. Turn one off."
        )
    return found


def _is_same(one: Concept, other: Concept) -> bool:
    if [file.stat().st_size for file in one.files] != [file.stat().st_size for file in other.files]:
        return False
    return list(map(file_hash, one.files)) == list(map(file_hash, other.files))


def _named(concepts: Sequence[Concept]) -> str:
    """Their rows and their files."""
    names = " and ".join(dict.fromkeys(one.file.name for one in concepts if one.file is not None))
    rows = rows_of(concepts)
    return f"{rows.capitalize()} ({names})" if rows else names
