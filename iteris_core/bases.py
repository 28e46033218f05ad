"""What is known of a base model without its weights: its kind, and its sites' names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One family of base models, and what trainers and file headers call it.

    ``text_prefixes`` are the kohya prefixes of the text encoders, in the order of the components
    ``text_encoder``, ``text_encoder_2``, ``text_encoder_3``; ``native`` tells whether sd-scripts
    names the denoiser's modules as the original code does (``input_blocks``, ``double_blocks``) or
    as diffusers does.
    """

    name: str
    title: str
    native: bool
    text_prefixes: tuple[str, ...]
    version: str  # ss_base_model_version
    architecture: str  # modelspec.architecture, without "/lora"
    module: str = "networks.lora"  # ss_network_module


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("sd1", "SD 1.x", False, ("lora_te",), "sd_v1", "stable-diffusion-v1"),
        Kind("sd2", "SD 2.x", False, ("lora_te",), "sd_v2", "stable-diffusion-v2-512"),
        Kind(
            "sdxl", "SDXL", True, ("lora_te1", "lora_te2"),
            "sdxl_base_v1-0", "stable-diffusion-xl-v1-base",
        ),
        Kind(
            "sd3", "SD 3", True, ("lora_te1", "lora_te2", "lora_te3"),
            "sd3_m", "stable-diffusion-3-medium", "networks.lora_sd3",
        ),
        Kind("flux", "FLUX.1", True, ("lora_te1", "lora_te3"), "flux1", "flux-1-dev",
             "networks.lora_flux"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """``shapes`` maps every site of the base model to the shape of its weight."""

    kind: Kind
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def denoiser(self) -> str:
        """The component that is denoising: ``unet`` or ``transformer``."""
        return "transformer" if self.kind.name in ("sd3", "flux") else "unet"


def describe_base(shapes: Mapping[str, tuple[int, ...]]) -> Base | None:
    """The base that has these sites; None where no kind of :data:`KINDS` fits."""
    if any(site.startswith("transformer.single_transformer_blocks.") for site in shapes):
        name = "flux"
    elif any(".norm1_context." in site for site in shapes if site.startswith("transformer.")):
        name = "sd3"
    elif not any(site.startswith("unet.") for site in shapes):
        return None
    elif any(site.startswith(("unet.add_embedding.", "text_encoder_2.")) for site in shapes):
        name = "sdxl"
    else:
        cross = [s for site, s in shapes.items() if site.endswith(".attn2.to_k")]
        name = "sd2" if cross and cross[0][1] == 1024 else "sd1"
    return Base(KINDS[name], shapes)


def text_component(site: str) -> int | None:
    """0 for ``text_encoder.…``, 1 for ``text_encoder_2.…`` and so on; None for other sites."""
    component = site.partition(".")[0]
    if component == "text_encoder":
        return 0
    number = component.removeprefix("text_encoder_")
    return int(number) - 1 if number in ("2", "3") else None
