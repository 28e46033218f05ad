"""Prompt lists for comparing methods, by name.

They are our own, in the manner of the lists of DreamBooth (contexts, outfits, properties) and of
CustomConcept101 (compositions); CustomConcept101's own list is for research only.
"""

from __future__ import annotations

from collections.abc import Mapping

PROMPT_LISTS: Mapping[str, tuple[str, ...]] = {
    "composition": (
        "a photo of {all}",
        "a photo of {all} on the beach",
        "a photo of {all} in the snow",
        "a photo of {all} on a wooden table",
        "a photo of {all} in a garden",
        "a photo of {all} in front of a brick wall",
        "a watercolor painting of {all}",
        "a photo of {all} in the city at night",
    ),
    "objects": (
        "a photo of {all} in a forest",
        "a photo of {all} on a rocky shore",
        "a photo of {all} on a white carpet",
        "a photo of {all} on a stone path",
        "a photo of {all} beside a cup of coffee",
        "a photo of {all} with a lake in the background",
        "a photo of {all} with a tall tower in the background",
        "a photo of {all} on top of a blue blanket",
        "a photo of {all} under a glass dome",
        "a photo of {all} made of ice",
        "a photo of {all} in the rain",
        "a pencil drawing of {all}",
    ),
    "animals": (
        "a photo of {all} in a meadow",
        "a photo of {all} sleeping on a sofa",
        "a photo of {all} running on wet sand",
        "a photo of {all} looking out of a window",
        "a photo of {all} wearing a knitted scarf",
        "a photo of {all} wearing a straw hat",
        "a photo of {all} in a wizard's robe",
        "a photo of {all} with mountains in the background",
        "a photo of {all} in a train compartment",
        "a photo of {all} on a skateboard",
        "an oil painting of {all}",
        "a comic strip with {all}",
    ),
}
