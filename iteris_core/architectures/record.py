"""The record type for base model architectures, and what records share: how a name in a LoRA file
maps to rows of sites, and text encoders (CLIP, T5, language models).

To add one, define an :class:`Architecture` in a file of this package, list it in
:data:`.ARCHITECTURES`, and say there how to recognise it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sites import Component, Wiring

Shapes = Mapping[str, tuple[int, ...]]
"""Site or tensor key → shape."""


@dataclass(frozen=True)
class Piece:
    """The ``rows`` of a file's tensor, (start, stop) each and in this order, are the rows of
    ``site`` starting at ``start``."""

    site: str
    rows: tuple[tuple[int, int], ...]
    start: int = 0

    @property
    def length(self) -> int:
        """The number of rows."""
        return sum(stop - start for start, stop in self.rows)

    def of_file(self, matrix: Tensor) -> Tensor:
        """The piece's rows of a file's ``matrix``, in the site's order."""
        return torch.cat([matrix[start:stop] for start, stop in self.rows])

    def place(self, matrix: Tensor, into: Tensor) -> None:
        """Write the piece's rows of the site's ``matrix`` to their positions in a file's tensor."""
        at = self.start
        for start, stop in self.rows:
            into[start:stop] = matrix[at : at + stop - start]
            at += stop - start


Alias = tuple[Piece, ...]
"""All pieces of a file's tensor."""


def whole(site: str, shapes: Shapes) -> Alias:
    """The alias for a module that is one site."""
    return fused([site], shapes)


def fused(sites: Sequence[str], shapes: Shapes) -> Alias:
    """The alias for a module with the rows of ``sites`` concatenated."""
    pieces: list[Piece] = []
    start = 0
    for site in sites:
        stop = start + shapes[site][0]
        pieces.append(Piece(site, ((start, stop),)))
        start = stop
    return tuple(pieces)


def permuted(site: str, order: Sequence[int], start: int = 0) -> Alias:
    """The alias for a module whose row ``order[i]`` is row ``start + i`` of ``site``."""
    runs: list[tuple[int, int]] = []
    for row in order:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return (Piece(site, tuple(runs), start),)


def file_rows(alias: Alias) -> int:
    """The number of rows of the file's tensor."""
    return max(stop for piece in alias for _, stop in piece.rows)


@dataclass(frozen=True)
class Architecture:
    """``name`` and the displayed ``title``; every other field has a default that means unknown.

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


@dataclass(frozen=True)
class BaseModel:
    """Everything needed to read and write a LoRA file. ``shapes`` maps every site to its weight's
    shape. ``aliases`` maps every name that a file may use for a module, with prefix and without
    leaf, to its alias. ``written`` are the names to write, each for whole sites."""

    architecture: Architecture
    shapes: Shapes
    aliases: Mapping[str, Alias]
    written: Mapping[str, Alias]


TEXT_WIRINGS = (
    # T5: each sublayer normalises what it reads.
    Wiring({"SelfAttention.o": "layer_norm"}),
    Wiring({"EncDecAttention.o": "layer_norm"}),
    Wiring({"DenseReluDense.wo": "layer_norm"}),
    # Llama, Mistral, Qwen.
    Wiring({"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}),
    # GPT-2.
    Wiring(
        {"attn.c_proj": "ln_1", "crossattention.c_proj": "ln_cross_attn", "mlp.c_proj": "ln_2"},
        extra=frozenset({"crossattention", "ln_cross_attn"}),
    ),
    # CLIP, SigLIP, BLIP's vision model.
    Wiring(
        {
            "self_attn.out_proj": "layer_norm1",
            "self_attn.projection": "layer_norm1",
            "mlp.fc2": "layer_norm2",
        }
    ),
    # BERT, RoBERTa, BLIP's text model. The sum is normalised after the branch, so the branch reads
    # the stream directly.
    Wiring(
        {
            "attention.output.dense": "attention.self.query",
            "crossattention.output.dense": "crossattention.self.query",
            "output.dense": "intermediate.dense",
        },
        extra=frozenset({"crossattention"}),
        requires=("attention.output.LayerNorm", "output.LayerNorm"),
        forbids=("attention.LayerNorm", "LayerNorm"),
    ),
)
"""Where layers of transformers models add to their stream. ComfyUI uses the same names."""


CONNECTORS = ("text_conditioner", "connectors")
"""Components between text encoder and denoiser in some pipelines."""


def text_component(site: str) -> int | None:
    """0 for ``text_encoder.…``, 1 for ``text_encoder_2.…`` and so on; None for other sites."""
    component = site.partition(".")[0]
    if component == "text_encoder":
        return 0
    number = component.removeprefix("text_encoder_")
    return int(number) - 1 if number in ("2", "3", "4") else None


def is_t5(site: str) -> bool:
    """True if a site belongs to T5."""
    return text_component(site) is not None and site.partition(".")[2].startswith(
        ("encoder.block.", "shared")
    )


def clip(width: int, layers: int, projected: bool) -> Component:
    """A CLIP text encoder."""
    sizes = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64,
        "num_hidden_layers": layers, "projection_dim": width,
    }  # fmt: skip
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return Component("transformers", name, sizes)


T5_XXL = Component("transformers", "T5EncoderModel", {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
})  # fmt: skip
"""The encoder of T5 v1.1 XXL."""
