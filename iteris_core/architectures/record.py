"""The record of one architecture of base models, of which each file here has one.

To add an architecture put a file into this package that has an :data:`ARCHITECTURE`; nothing else
changes. Whoever has one outside of it calls :func:`..architectures.register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .row_mapping import Alias, Shapes
from .sites import Component, Wiring
from .text import is_t5


@dataclass(frozen=True)
class Architecture:
    """``title`` is for people; every other field has a default, for what is unknown.

    ``fits_sites(shapes)`` looks at the sites of a loaded model, name → shape of the weight;
    ``fits_file(shapes, metadata)`` at the tensors of a LoRA file; those that were registered last
    are asked first. ``components`` are its models at the released size; a pipeline's denoiser is of
    the class that is named there. ``denoiser`` is the component that denoises.
    ``original_names(shapes)`` are the names of the original code for the denoiser's modules,
    without prefix; ``native`` tells whether sd-scripts uses them in its files (else diffusers').
    ``further_names`` are names that some tool has beside those.
    ``text_prefixes`` are the kohya prefixes of the components ``text_encoder``, ``text_encoder_2``,
    ``text_encoder_3``; ``clips`` are ComfyUI's names of the CLIP encoders in that order.
    ``version``, ``modelspec`` and ``network`` go into a file's ``ss_base_model_version``,
    ``modelspec.architecture`` (before ``/lora``) and ``ss_network_module``; empty ones stay out.
    ``one_alpha`` are components of which diffusers reads one alpha only in kohya layout;
    ``reads_kohya(site)`` tells whether it reads the site's change in that layout at all.
    ``wirings`` say where the denoiser adds to its residual stream. ``pipeline`` is the name of
    diffusers' class for what its single-file detection calls ``single_files``.
    """

    name: str
    title: str
    fits_sites: Callable[[Shapes], bool] = lambda shapes: False
    fits_file: Callable[[Shapes, Mapping[str, str]], bool] = lambda shapes, metadata: False
    components: Mapping[str, Component] = field(default_factory=dict[str, Component])
    denoiser: str = "transformer"
    original_names: Callable[[Shapes], dict[str, Alias]] = lambda shapes: {}
    further_names: Callable[[Shapes], dict[str, Alias]] = lambda shapes: {}
    native: bool = False
    text_prefixes: tuple[str, ...] = ()
    clips: tuple[str, ...] = ("clip_l", "clip_g")
    version: str = ""
    modelspec: str = ""
    network: str = "networks.lora"
    one_alpha: tuple[str, ...] = ()
    reads_kohya: Callable[[str], bool] = lambda site: True
    wirings: tuple[Wiring, ...] = ()
    pipeline: str = ""
    single_files: tuple[str, ...] = ()

    def diffusers_reads(self, site: str, layout: str) -> bool:
        """True if diffusers (0.42) reads a site's change in a file of ours. It never reads T5's."""
        return not is_t5(site) and (layout != "kohya" or self.reads_kohya(site))


def said_base(metadata: Mapping[str, str]) -> str:
    """The base model that a file's metadata name."""
    return metadata.get("ss_base_model_version", "") + metadata.get("modelspec.architecture", "")


def key_width(shapes: Shapes, part: str) -> int | None:
    """Number of inputs of the first key projection in a file whose name has ``part``."""
    for key, shape in shapes.items():
        down = any(mark in key for mark in ("lora_A", "lora_down", ".down."))
        if part in key and "to_k" in key and down and len(shape) > 1:
            return shape[1]
    return None
