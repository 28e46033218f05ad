"""The calibration of a merge: which samples its features are collected on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .errors import SettingsError
from .settings import Settings, setting


def prompt_list(name: str) -> tuple[str, ...]:
    """The lines of ``prompts/NAME.txt``."""
    file = Path(__file__).parent / "prompts" / f"{name}.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


TEMPLATES = prompt_list("templates")
"""With "{}" for the concept."""
_STEPS = 4
LEAST_SAMPLES = 12
"""Per concept; with fewer, a merge keeps too little."""


@dataclass(frozen=True)
class Calibration(Settings):
    """Settings for the samples on which features are collected."""

    samples: int = setting(
        80,
        "Prompts per concept on which features are collected. Below 20 the merge fits its prompts "
        "too closely.",
        low=1,
        most=1000,
    )
    total_samples: int | None = setting(
        400,
        "Prompts of all LoRAs together; many LoRAs get fewer each, at least 12. Ignored for text "
        "models.",
        none="no limit, as when samples is set by itself",
        low=1,
        most=10_000,
    )
    minutes: float | None = setting(
        None,
        "Roughly how long the merge may take. Decides how many of the prompts run, at least 12 "
        "per concept. Ignored for text models.",
        none="no limit, all prompts run",
        above=0,
        most=1440,
        step=1.0,
    )
    timesteps: int | None = setting(
        None, "Latents per prompt, from different denoising steps.", none="4", low=1, most=10
    )
    latents: Literal["denoising", "noise"] = setting(
        "denoising",
        "denoising first denoises samples with each LoRA. noise skips this: faster, slightly "
        "worse.",
    )
    denoising_steps: int = setting(6, "Denoising steps for each LoRA's samples.", low=1, most=100)
    guidance: float = setting(
        1.0,
        "Above 1, samples are denoised with classifier-free guidance, at twice the cost.",
        low=0,
        most=30,
    )
    empty_share: float = setting(
        0.2,
        "Share of rows with the empty prompt, because guidance also runs on it.",
        low=0,
        below=1,
    )
    latent_size: int | None = setting(
        None,
        "Side length of the latents: image pixels divided by the model's compression.",
        none="set by the model: 1024 tokens at its middle block, at most its native size",
        low=1,
        most=256,
    )
    frames: int | None = setting(
        None, "Frames of a video, before compression.", none="9", low=1, most=1000
    )
    contexts: float | None = setting(
        None,
        "Share of a concept's rows whose prompt gets extra words before or after it, so that the "
        "merge also works on other prompts.",
        none="a quarter; half from six LoRAs on or with a style; more with few prompts",
        low=0,
        high=1,
    )
    generic: float = setting(
        0.2,
        "Weight of prompts that name no concept; a concept has 1. They preserve the base and "
        "what other words mean. 0 leaves them out.",
        low=0,
        most=10,
    )
    class_words: float = setting(
        0.0,
        "Weight of prompts with a class word and no trigger. They preserve the base.",
        low=0,
        most=10,
    )
    conditions: float | None = setting(
        None,
        "Share of rows at other strengths or beside a LoRA.",
        none="a quarter",
        low=0,
        high=1,
    )
    composites: float = setting(
        0.2,
        "Weight of prompts that name a subject and a style at once; a concept has 1. Both LoRAs "
        "act on them. 0 leaves them out.",
        low=0,
        most=10,
    )
    templates: Sequence[str] = TEMPLATES
    """With "{}" for the concept."""
    seed: int = setting(
        0,
        "Seeds prompts and latents. The same seed gives the same LoRA.",
        low=0,
        high=0xFFFFFFFFFFFFFFFF,
    )

    def settled(self, loras: int, *, pictures: bool) -> Calibration:
        """A copy for a merge of so many ``loras``, with ``timesteps`` set and, for models of
        ``pictures``, ``samples`` within ``total_samples``. Settled again, it stays the same."""
        samples = self.samples
        if pictures and self.total_samples is not None:
            each = max(LEAST_SAMPLES, self.total_samples // max(loras, 1))
            samples = min(samples, each)
        return replace(self, timesteps=self.rows_each, samples=samples)

    @property
    def rows_each(self) -> int:
        """Rows per sample."""
        return self.timesteps or min(_STEPS, self.denoising_steps)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "templates", tuple(self.templates))
        if self.timesteps is not None and self.timesteps > self.denoising_steps:
            raise SettingsError(
                f"timesteps is {self.timesteps}, but denoising_steps is {self.denoising_steps}: "
                f"set option denoising_steps to {self.timesteps} or more."
            )
        if any(template.count("{}") != 1 for template in self.templates) or not self.templates:
            raise SettingsError('templates must hold "{}" where the concept goes, once.')


def over(values: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a calibration, ``upper`` over ``values``. A number of samples without a total is
    for each LoRA."""
    return {**values, **({"total_samples": None} if "samples" in upper else {}), **upper}
