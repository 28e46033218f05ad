"""The record type for base model architectures.

To add one, define an :class:`Architecture` in a file of this package, list it in
:data:`.detection.ARCHITECTURES`, and say there how to recognise it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .row_mapping import Alias, Shapes
from .sites import Component, Wiring
from .text import is_t5


@dataclass(frozen=True)
class Architecture:
    """``title`` is the display name; every other field has a default that means unknown.

    ``components`` are its models at the released size; they name the class of a pipeline's
    denoiser. ``denoiser`` is the denoising component. ``original_names(shapes)`` are the original
    code's names for the denoiser's modules, without prefix; ``native`` says whether sd-scripts uses
    them in its files (otherwise diffusers'). ``further_names`` are additional names from some
    tools. ``text_prefixes`` are the kohya prefixes of the components ``text_encoder``,
    ``text_encoder_2``, ``text_encoder_3``; ``clips`` are ComfyUI's names of the CLIP encoders in
    that order. ``version``, ``modelspec`` and ``network`` are written to a file's
    ``ss_base_model_version``, ``modelspec.architecture`` (before ``/lora``) and
    ``ss_network_module``, unless empty. ``one_alpha`` are components for which diffusers reads only
    one alpha in kohya layout; ``reads_kohya(site)`` says whether it reads the site's change in that
    layout at all. ``wirings`` describe where the denoiser adds to its residual stream. ``pipeline``
    is the diffusers class for the ``single_files`` types of its single-file detection.
    """

    name: str
    title: str
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
        """True if diffusers (0.42) reads a site's change in a written file. It never reads T5's."""
        return not is_t5(site) and (layout != "kohya" or self.reads_kohya(site))
