"""The inputs that ComfyUI gives a denoiser besides its latents: those from each row's own text, and
those that the user connected (reference latents, a first frame, a mask, a control), equal for all
rows."""

from __future__ import annotations

import uuid
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..iteris_core.errors import IterisError
from ..iteris_core.hosts import recorded
from .comfy_internals import comfy
from .comfy_text import Conditioning

Inputs = dict[str, Any]
"""A conditioning, as ComfyUI prepares it for one row: a dictionary with ``model_conds``."""

_OF_THE_TEXT = ("pooled_output", "attention_mask", "conditioning_", "t5xxl_", "cross_attn")
"""Prefixes of entries that come from text encoders; every row has those of its own text."""
_WHERE_AND_WHEN = frozenset(
    ("area", "mask", "mask_strength", "strength", "set_area_to_bounds", "start_percent",
     "end_percent", "clip_start_percent", "clip_end_percent", "default", "hooks", "model_conds",
     "uuid")
)  # fmt: skip
"""Entries that restrict a text to a part of the image or of its denoising."""


@dataclass(frozen=True)
class References:
    """The inputs that the user connected besides the texts: ``entries`` of a CONDITIONING, added to
    every row's; a ``latent`` (1, …) from which all rows start; and the ``mask`` of the area to
    denoise."""

    entries: Mapping[str, Any] = field(default_factory=dict[str, Any])
    latent: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, conditioning: Any = None, latent: Any = None) -> References:
        """From the first entry of a CONDITIONING, and the first image of a LATENT."""
        entries = dict(conditioning[0][1]) if conditioning else {}
        entries = {
            name: value
            for name, value in entries.items()
            if name not in _WHERE_AND_WHEN and not name.startswith(_OF_THE_TEXT)
        }
        if not latent:
            return cls(entries)
        samples, mask = latent["samples"], latent.get("noise_mask")
        if samples.is_nested:
            raise IterisError(
                "The LATENT combines image and sound, which a merge does not support; connect a "
                "LATENT of the image only, or none."
            )
        frames_first = samples.ndim == 5  # for a video's mask, as ComfyUI expects it
        if mask is not None and (mask.ndim == 5 or (mask.ndim > 2 and not frames_first)):
            mask = mask[:1]
        return cls(entries, samples[:1], mask)

    def beside(self, text: Conditioning) -> list[Any]:
        """``text`` in ComfyUI's form, with the references."""
        states, own = text
        return [states, {**self.entries, **own}]


def kind(inputs: Inputs) -> Hashable:
    """A key, equal for texts with the same inputs, shapes and constants: they share a forward."""
    conds = inputs["model_conds"]
    rows = {n: 0 for n, c in conds.items() if not isinstance(c, comfy.conds.CONDConstant)}
    return recorded.kind(_call(inputs), rows, masks=False)


def size(inputs: Inputs) -> int:
    """The number of elements in one row's inputs."""
    return recorded.size(_call(inputs))


def _call(inputs: Inputs) -> recorded.Call:
    return {name: cond.cond for name, cond in inputs["model_conds"].items()}


def joined(rows: Sequence[Inputs]) -> Inputs:
    """The inputs of several rows, joined into one batch. Entries that are not for the model come
    from the first row; all rows use one CLIP."""
    first, *others = (row["model_conds"] for row in rows)
    conds = {
        name: type(cond)(cond.concat([other[name] for other in others]))
        for name, cond in first.items()
    }
    return {**rows[0], "model_conds": conds, "uuid": uuid.uuid4()}


def sharing(inputs: Inputs, first: Inputs) -> Inputs:
    """``inputs``, sharing equal tensors with ``first``: references are the same for all texts, and
    may be larger than the texts."""
    conds = dict(inputs["model_conds"])
    for name, cond in conds.items():
        known = first["model_conds"].get(name)
        if known is not None and _equal(cond.cond, known.cond):
            conds[name] = known
    return {**inputs, "model_conds": conds}


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_equal, one, two))
    tensors = isinstance(one, Tensor) and isinstance(two, Tensor)
    return tensors and one.shape == two.shape and one.device == two.device and torch.equal(one, two)
