"""FLUX in miniature, with guidance by a second forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from .words import SIZE, world

LENGTH = 16
"""Tokens of a caption: two things of three words on a background are 15 with the end."""


class EmojiPipeline(FluxPipeline):
    """FLUX's pipeline with this world's size, caption length and guidance as defaults."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        negative_prompt: Any = "",
        true_cfg_scale: float = world()["sampling"]["guidance"],
        num_inference_steps: int = world()["sampling"]["steps"],
        max_sequence_length: int = LENGTH,
        height: int = SIZE,
        width: int = SIZE,
        **options: Any,
    ) -> Any:
        """As FLUX's; the prompt that guides away is empty, one for each prompt."""
        if isinstance(negative_prompt, str) and isinstance(prompt, list):
            negative_prompt = [negative_prompt] * len(prompt)
        return super().__call__(
            prompt,
            prompt_2,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
            num_inference_steps=num_inference_steps,
            max_sequence_length=max_sequence_length,
            height=height,
            width=width,
            **options,
        )


def load(folder: Path) -> Any:
    """The pipeline in `folder`, in float32 (the files are float16), without a progress bar."""
    pipeline: Any = EmojiPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.to(dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
