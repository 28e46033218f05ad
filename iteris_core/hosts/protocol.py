"""The interface between a base model and the merge.

A host is thin: it names the sites, reads LoRA files, makes samples and runs forwards. To add one,
write a class with the members of :class:`Host`; nothing else has to change. A subclass of it has
those that are given here as a host without prompts has them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..activations.lockstep import Lockstep
from ..architectures.sites import plain_parameter, plain_weight
from ..concepts import Calibration, Concept
from ..errors import BaseError, ModelStateError
from ..lora import Lora
from ..lora_files import ReadOptions
from .learned import EmbeddingTriggers

Run = Callable[[Sequence[int], int], None]
"""``run(rows, copies)``: one forward, see :class:`Stage`."""

Tick = Callable[[str, int, int], None]
"""``tick(what, done, total)``: shows progress; what it raises ends the merge. What has no
count has a ``total`` of 0."""

DENOISING = "denoising steps"
"""``what`` a host ticks while it denoises samples: a step of one sample is one."""


@dataclass(frozen=True)
class Stage:
    """A part of the model that runs on its own, in execution order: an encoder, the denoiser.

    ``concept_ids`` is the concept of every row, ascending. ``run(rows, copies)`` does one forward
    on those rows, reference rows first, and then once more as merged rows if ``copies`` is 2.
    ``sites`` are those of the wanted sites that it reaches. ``mask(site, rows)`` is (rows, tokens),
    True where a token of the site's inputs counts (no padding); None where all do. ``feeds_next``
    says that a later stage needs what all rows give: then every process of a merge runs all of
    them, to their end, while the forwards of other stages may be left behind their last site.
    ``spatial`` says that tokens are places of a picture, of which a LoRA may change a part.
    ``picture`` is (…, height, width) of a row's latents (None: unknown). ``patches`` are the sides
    of a token's patch, in latents: a transformer has one, a UNet one for each level. ``batch_keys``
    is a kind for every row: only rows of one kind may share a forward (None: all may). ``lengths``
    is the size of every row's inputs, in any unit: the longest row is the one whose memory is
    measured (None: that with the most tokens by ``mask``, or the first). ``samples`` is how many
    samples of a concept the rows are made from, of the concept with the fewest (None: as many as
    the calibration says). ``rows`` are which of the samples' rows these are, where several stages
    share them (None: all). ``gradients()`` is what a host wants entered where a part of the model
    is going to be differentiated.
    """

    name: str
    sites: Sequence[str]
    concept_ids: Sequence[int]
    run: Run
    mask: Callable[[str, Sequence[int]], torch.Tensor | None] | None = None
    feeds_next: bool = False
    spatial: bool = False
    picture: Sequence[int] | None = None
    patches: Sequence[int] = (1, 2, 4, 8)
    batch_keys: Sequence[Hashable] | None = None
    lengths: Sequence[int] | None = None
    samples: int | None = None
    rows: Sequence[int] | None = None
    gradients: Callable[[], AbstractContextManager[None]] = nullcontext


class Host(Protocol):
    pictures: bool
    """True if it makes pictures. There two concepts seldom compete for a place; two ways of writing
    do for every word."""

    def sites(self) -> Mapping[str, nn.Module]:
        """Every module that a LoRA may change, by site name."""
        ...

    def weight(self, site: str) -> torch.Tensor:
        """The weight of a site as forwards use it, float32, on the CPU. Raises :class:`BaseError`
        where it cannot be read."""
        return plain_weight(site, self.sites()[site], "An extraction")

    def parameters(self) -> Mapping[str, nn.Module]:
        """The module of every parameter that is no site's weight (biases, normalisations,
        embeddings), by the parameter's name, such as ``unet.conv_in.bias``."""
        return {}

    def parameter(self, name: str) -> torch.Tensor:
        """The value of one of :meth:`parameters`, as :meth:`weight` gives those of sites."""
        return plain_parameter(name, self.parameters()[name])

    def read_lora(self, path: str | Path, options: ReadOptions | None = None) -> Lora:
        """Read a file of any layout that the host's ecosystem knows."""
        ...

    def samples(
        self,
        concepts: Sequence[Concept],
        sites: Set[str],
        calibration: Calibration,
        lockstep: Lockstep,
        generator: torch.Generator,
        tick: Tick,
    ) -> Any:
        """Make the rows on which features are collected; opaque to everybody but the host. With
        ``lockstep.processes`` the work may be shared, but every process needs all rows."""
        ...

    def token_counts(
        self, prompts: Sequence[str], owners: Sequence[int] | None = None
    ) -> list[int]:
        """The number of tokens of each prompt, with start and end but without padding; as prompts
        of the concepts ``owners``, if they are given. Raises :class:`BaseError` where the host does
        not work from prompts."""
        raise BaseError(f"This method needs prompts; {type(self).__name__} has none.")

    def added(self, concepts: Sequence[Concept], calibration: Calibration) -> Sequence[Concept]:
        """Further concepts of a merge, without a LoRA of their own: prompts, or inputs, that hold
        the base where no concept is called for (``calibration.generic``), and behind them
        composites (``calibration.composites``); none where there are none."""
        return []

    def forward(self, samples: Any, rows: Sequence[int]) -> torch.Tensor:
        """The model's final output for rows of ``samples``, rows first; differentiable."""
        ...

    def learned(self, prompt: str) -> Set[str]:
        """The embeddings in a prompt that were added to the text encoders' vocabulary (textual
        inversion), by the names that call for them there."""
        return set()

    def activate(
        self, triggers: Sequence[EmbeddingTriggers]
    ) -> AbstractContextManager[Sequence[Set[str]]]:
        """While it is entered, prompts of a concept have the embeddings in force for which they
        call; it gives the names of those that are, by concept."""
        return nullcontext([set() for _ in triggers])

    def streams(self, sites: Set[str]) -> Mapping[str, nn.Module]:
        """Sites whose output is added to a residual stream, each with the module whose input is
        that stream as it is. Those that are not among ``sites`` are advised as repair sites: a
        change there takes out drift that the sites before have left (none: an empty mapping)."""
        ...

    def stages(self, samples: Any, sites: Set[str]) -> Iterator[Stage]:
        """The stages that reach ``sites``. All rows of one must be run before the next."""
        ...

    def room(self, wanted: int) -> int:
        """Bytes that the stage which was given last may take beyond the model. An application that
        holds other things in memory first makes room for ``wanted`` bytes, as far as it can."""
        ...


def check_model(model: nn.Module) -> None:
    """Raise :class:`IterisError` where peft's layers stand in place of the model's own, and as
    :func:`check_uncompiled` does."""
    check_uncompiled(model)
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise ModelStateError(
            f"{type(model).__name__} has adapters loaded; a merge needs the base model alone. "
            "Unload them (pipeline.unload_lora_weights() or model.unload()), or load it again."
        )


def check_uncompiled(model: nn.Module) -> None:
    """Raise :class:`IterisError` for what torch.compile has made: it does not see hooks that come
    later."""
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        raise ModelStateError(
            f"{type(getattr(model, '_orig_mod', model)).__name__} is compiled (torch.compile), "
            "which hides its layers. Load the pipeline again, and compile it after the merge."
        )


def check_ready(model: nn.Module) -> None:
    """Raise :class:`IterisError` where dropout would make every forward another, where adapters
    were put on the model since :func:`check_model`, and where diffusers offloads it by blocks:
    while a row waits in a block, another one that leaves it takes the weights off the device."""
    check_model(model)
    if any(_in_blocks(module) for module in model.modules()):
        raise ModelStateError(
            f"{type(model).__name__} is offloaded in groups of blocks, whose weights leave the "
            'device while rows wait in a block; offload it with offload_type="leaf_level", or by '
            "enable_model_cpu_offload()."
        )
    if model.training:
        raise ModelStateError(
            f"{type(model).__name__} is in training mode, in which dropout makes its output "
            "random; call its eval() first."
        )


def _in_blocks(module: Any) -> bool:
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    config = getattr(hooks.get("group_offloading"), "config", None)
    return getattr(config, "offload_type", None) == "block_level"  # an enumeration of strings
