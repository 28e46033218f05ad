"""What a reduced pipeline is, and how it draws."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from iteris_core.hosts.diffusers_loop import progress_bars

PROMPTS = (
    *("a dog", "sks cat on a table", "two red dogs in the rain with a small green bird"),
    *("", "a long story of one dog and one cat " * 4, "a bird"),
)
"""Of unlike lengths, the empty one and one of more than 77 tokens among them."""

DENOISERS = ("unet", "transformer", "transformer_2")


@dataclass
class Reduced:
    """``call`` has what ``pipeline(prompt=…, num_inference_steps=…, generator=…)`` takes beside;
    ``settings`` are those of a merge, ``left_out`` a part that is not merged at all."""

    pipeline: Any
    call: dict[str, Any] = field(default_factory=dict[str, Any])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    left_out: str = ""
    prompts: tuple[str, ...] = PROMPTS


def seeded(make: Callable[[], Reduced]) -> Callable[[], Reduced]:
    """``make`` with the same weights every time, in evaluation mode and without progress bars.

    The denoiser's matrices keep the size of what they are given, also those that training begins
    at zero; else the text would hardly reach what is drawn.
    """

    def made() -> Reduced:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            reduced = make()
            for name, part in reduced.pipeline.components.items():
                if isinstance(part, torch.nn.Module):
                    part.eval().requires_grad_(False)
                for weight in part.parameters() if name in DENOISERS and part else ():
                    if weight.ndim > 1:
                        weight.normal_(std=weight[0].numel() ** -0.5)
        _without_bars(reduced.pipeline)
        return reduced

    return made


def _without_bars(pipeline: Any) -> None:
    for bar in progress_bars(pipeline):
        bar.set_progress_bar_config(disable=True)


def draw(reduced: Reduced, prompt: str = "sks cat on a table", seed: int = 3) -> Tensor:
    """The latents after two steps."""
    generator = torch.Generator().manual_seed(seed)
    call = {"prompt": prompt, "num_inference_steps": 2, "generator": generator, **reduced.call}
    with torch.no_grad():
        if hasattr(reduced.pipeline, "blocks"):  # a modular one
            return reduced.pipeline(output="latents", **call)
        drawn = reduced.pipeline(output_type="latent", return_dict=False, **call)[0]
    return drawn[0] if isinstance(drawn, list) else drawn
