"""What differs between the bases that are trained here: FLUX's blocks and SD 3's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import pipeline as flux
from .. import sd3
from .latents import SIDE

Models = dict[str, Any]
Captions = tuple[Tensor, Tensor]
"""Token numbers for the CLIPs and for T5."""

_FLUX_IDS = flux.EmojiPipeline._prepare_latent_image_ids(
    1, SIDE // 2, SIDE // 2, torch.device("cpu"), torch.float32
)


def _flux_velocity(models: Models, noised: Tensor, sigma: Tensor, captions: Captions) -> Tensor:
    pooled = models["clip"](captions[0]).pooler_output
    words = models["t5"](captions[1])[0]
    return models["transformer"](
        hidden_states=noised,
        timestep=sigma,
        pooled_projections=pooled,
        encoder_hidden_states=words,
        txt_ids=torch.zeros(words.shape[1], 3),
        img_ids=_FLUX_IDS,
        return_dict=False,
    )[0]


def _sd3_velocity(models: Models, noised: Tensor, sigma: Tensor, captions: Captions) -> Tensor:
    words, pooled = sd3.embeds(models, captions)
    pictures = flux.EmojiPipeline._unpack_latents(noised, 4 * SIDE, 4 * SIDE, 4)
    velocity = models["transformer"](
        hidden_states=pictures,
        timestep=1000 * sigma,
        pooled_projections=pooled,
        encoder_hidden_states=words,
        return_dict=False,
    )[0]
    return flux.EmojiPipeline._pack_latents(velocity, *velocity.shape)


@dataclass(frozen=True)
class Family:
    """A kind of base: its folder of weights, its parts, and what it predicts of packed latents."""

    folder: str
    batch: int
    muon: bool
    transformer: Callable[[], nn.Module]
    encoders: Callable[..., tuple[nn.Module, ...]]
    velocity: Callable[[Models, Tensor, Tensor, Captions], Tensor]
    assemble: Callable[..., Any]
    load: Callable[..., Any]
    parts: Mapping[str, str]
    """Name of a text encoder while training → in the pipeline."""

    def of_pipeline(self, pipeline: Any) -> Models:
        """The models of a pipeline by their names while training."""
        parts = {"transformer": "transformer", **self.parts}
        return {name: getattr(pipeline, part) for name, part in parts.items()}


FAMILIES = {
    "flux": Family(
        "base",
        64,
        True,
        flux.new_transformer,
        flux.new_text_encoders,
        _flux_velocity,
        flux.assemble,
        flux.load,
        {"clip": "text_encoder", "t5": "text_encoder_2"},
    ),
    "sd3": Family(
        "sd3",
        32,
        False,
        sd3.new_transformer,
        sd3.new_text_encoders,
        _sd3_velocity,
        sd3.assemble,
        sd3.load,
        {"clip": "text_encoder", "clip_2": "text_encoder_2", "t5": "text_encoder_3"},
    ),
}
