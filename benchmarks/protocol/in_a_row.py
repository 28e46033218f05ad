"""Two concepts side by side, each half denoised by what belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor

from iteris_core import Lora
from iteris_core.hosts.protocol import Host

from .drawing import Drawn, changed, noise_of

Part = tuple[Lora | None, Sequence[str]]
"""What denoises a half of the pictures: a LoRA, and a prompt for each picture."""


def side_by_side(
    pipeline: Any, host: Host, parts: Sequence[Part], pictures: Sequence[Drawn], **options: Any
) -> list[Image.Image]:
    """Pictures of a Stable Diffusion. At every step each of the two ``parts`` predicts the whole
    picture with its LoRA and prompts, of which its half is taken. ``options`` are the pipeline's
    own."""
    words: list[Any] = []
    for lora, prompts in parts:
        with changed(host, lora):
            words.append(pipeline.encode_prompt(prompts, pipeline.device, 1, True))
    plain = pipeline.unet.forward

    def whole(sample: Tensor, timestep: Any, **given: Any) -> tuple[Tensor]:
        halves: list[Tensor] = []
        for at, (lora, _) in enumerate(parts):
            given["encoder_hidden_states"] = torch.cat(words[at][::-1])
            with changed(host, lora):
                halves.append(plain(sample, timestep, **given)[0].chunk(2, -1)[at])
        return (torch.cat(halves, -1),)

    with patch.object(pipeline.unet, "forward", whole):
        return pipeline(
            prompt_embeds=words[0][0],
            negative_prompt_embeds=words[0][1],
            generator=[noise_of(one) for one in pictures],
            **options,
        ).images
