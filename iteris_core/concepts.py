"""What is merged, and the prompts on which its features are collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .errors import IterisError, SettingsError
from .lora import Lora

TEMPLATES = (
    "a photo of a {}",
    "a {}",
    "a close-up photo of a {}",
    "a {} on a white background",
    "a {} on a table",
    "a {} on the beach",
    "a {} in the snow",
    "a {} in a forest",
    "a {} in the city at night",
    "a {} in front of a mountain",
    "a {} next to a window",
    "a {} on a wooden floor",
    "a {} in the rain",
    "a {} under a blue sky",
    "a {} in a garden with flowers",
    "a {} at sunset",
    "a {} in a bright room",
    "a {} on grass",
    "a {} on a street",
    "a {} in front of a brick wall",
    "a black and white photo of a {}",
    "a photo of a {} from above",
    "a photo of a {} from the side",
    "a photo of two people with a {}",
    "a photo of a {} next to a cat",
    "a photo of a {} next to a dog",
    "a photo of a {} and a bicycle",
    "a watercolor painting of a {}",
    "an oil painting of a {}",
    "a pencil drawing of a {}",
    "a cartoon of a {}",
    "a poster of a {}",
    "a small {} in a wide landscape",
    "a {} in soft light",
    "a professional photo of a {}, studio lighting",
    "a {} on a red background",
    "a {} on a blue background",
    "a {} on a green background",
    "a {} in a kitchen",
    "a {} by the sea",
)


@dataclass(frozen=True)
class Concept:
    """One LoRA and how to call for what it knows.

    ``lora=None`` stands for prompts on which the base model is to stay as it is. ``prompts`` are
    used as they are; without them they are made from ``trigger`` and ``class_word``. ``strength``
    is what the LoRA would be loaded at, ``weight`` how much the concept counts in the merge.
    ``inputs``, or what calling it gives, are batches of keyword arguments of the model, for hosts
    that do not work from prompts.
    """

    lora: Lora | None
    prompts: Sequence[str] | None = None
    trigger: str = ""
    class_word: str = ""
    strength: float = 1.0
    weight: float = 1.0
    inputs: Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]] | None = None

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise SettingsError(f"{self.name}: weight must be 0 or more, not {self.weight}.")

    @property
    def name(self) -> str:
        words = self.trigger or (self.lora.name if self.lora is not None else "") or "base"
        return words

    @property
    def subject(self) -> str:
        return f"{self.trigger} {self.class_word}".strip()

    @property
    def counts(self) -> bool:
        """Strength 0 or weight 0 takes the concept out of the merge."""
        return self.weight > 0 and (self.lora is None or self.strength != 0)


@dataclass(frozen=True)
class Calibration:
    """How features are collected.

    ``samples`` prompts per concept, each with ``timesteps`` latents of its own; ``latents`` come
    from the LoRA's own denoising (``denoising_steps`` DDIM steps) or are ``noise``;
    ``empty_share`` of the rows get the empty prompt, since guidance runs on it too.
    ``guidance`` above 1 denoises with classifier-free guidance, at twice the cost.
    ``latent_size`` is the side of the latents (None: the model's own). ``templates`` hold ``{}``.
    """

    samples: int = 50
    timesteps: int = 4
    latents: Literal["denoising", "noise"] = "denoising"
    denoising_steps: int = 10
    guidance: float = 1.0
    empty_share: float = 0.2
    latent_size: int | None = None
    templates: Sequence[str] = TEMPLATES
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "timesteps", "denoising_steps"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.latents not in ("denoising", "noise"):
            raise SettingsError(f'latents must be "denoising" or "noise", not {self.latents!r}.')
        if not 0 <= self.empty_share < 1:
            raise SettingsError(f"empty_share must be in [0, 1), not {self.empty_share}.")
        if self.timesteps > self.denoising_steps:
            raise SettingsError(
                f"timesteps ({self.timesteps}) cannot exceed denoising_steps "
                f"({self.denoising_steps})."
            )
        if self.latent_size is not None and self.latent_size < 1:
            raise SettingsError(f"latent_size must be at least 1, not {self.latent_size}.")
        if not self.templates or not all("{}" in template for template in self.templates):
            raise SettingsError('templates must hold "{}" where the concept goes.')


def concept_prompts(
    concept: Concept, calibration: Calibration, generator: torch.Generator
) -> list[str]:
    """``calibration.samples`` prompts, in random order, repeated evenly if there are fewer."""
    if concept.prompts is not None:
        pool = [str(prompt) for prompt in concept.prompts]
        if not pool:
            raise IterisError(
                f"Concept {concept.name!r} has an empty prompt list; give prompts, or a trigger "
                "and a class word to make them from."
            )
    elif concept.subject:
        pool = [template.format(concept.subject) for template in calibration.templates]
    else:
        raise IterisError(
            f"Concept {concept.name!r} has neither prompts nor a trigger or class word; "
            "features cannot be collected without knowing how to call for it."
        )
    prompts: list[str] = []
    while len(prompts) < calibration.samples:
        order = torch.randperm(len(pool), generator=generator).tolist()
        prompts += [pool[index] for index in order]
    return prompts[: calibration.samples]
