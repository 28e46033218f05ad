"""The interface between a base model and the merge.

A host is thin: it names the sites, reads LoRA files, makes samples and runs forwards. To add one,
write a class with the members of :class:`Host`; nothing else has to change. A subclass inherits the
implementations given here, which suit a host without prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..activations.lockstep import Lockstep
from ..activations.rows import Loads, Row, phantoms, strength_of
from ..architectures.sites import plain_weight
from ..calibration import Calibration
from ..concepts import Concept
from ..errors import ModelStateError
from ..lora import Lora
from ..lora_files import ReadOptions
from .learned import EmbeddingTriggers
from .sample_store import SampleStore

Tick = Callable[[str, int, int], None]
"""``tick(what, done, total)`` shows progress; an exception raised in it ends the merge. ``total``
is 0 for messages without a count."""

DENOISING = "denoising steps"
"""The ``what`` of a host's ticks while it denoises samples; each step of one sample counts as
one."""


SAMPLES_AT_ONCE = 16
"""The most samples that are denoised in a forward."""


@dataclass(frozen=True)
class SampleRequest:
    """What rows are made of.

    - ``concepts``: those whose features are wanted.
    - ``calibration``: how many rows, of which prompts, denoised how.
    - ``lockstep``: runs a forward with each row's own LoRA active.
    - ``generator``: for random draws that depend on all concepts.
    - ``tick``: reports progress.
    - ``store``: keeps what is slow to make (None: nothing is kept).
    - ``at_once``: the most samples that are denoised in a forward, with guidance two rows each.
    - ``held_out``: the rows measure a merge, and have words that no row of a fit has.
    """

    concepts: Sequence[Concept]
    calibration: Calibration
    lockstep: Lockstep
    generator: torch.Generator
    tick: Tick
    store: SampleStore | None = None
    at_once: int = SAMPLES_AT_ONCE
    held_out: bool = False


@dataclass(frozen=True)
class Stage:
    """A part of the model that runs on its own, in execution order: an encoder, the denoiser.

    - ``sites``: the requested sites that it reaches.
    - ``rows``: in ascending order of concepts.
    - ``forward(rows, copies)``: one forward on these rows as reference rows, followed by the same
      rows as merged rows if ``copies`` is 2.
    - ``mask(site, rows)``: (rows, tokens), True for tokens of the site's inputs that count (no
      padding); None if all do.
    - ``feeds_next``: a later stage needs the outputs of all rows. Every process of a merge then
      runs all of them to the end; forwards of other stages may stop after their last site.
    - ``spatial``: tokens are positions in an image, of which a LoRA may change a part.
    - ``samples``: the number of samples behind the rows, for the concept with the fewest (None: the
      calibration's number).
    - ``final(rows, copy)``: the model's final outputs of these rows, rows first, with the texts
      of reference rows (copy 0) or of merged rows (1); None if the outputs are not final.
    - ``gradients()``: a context to enter before differentiating the model.
    """

    name: str
    sites: Sequence[str]
    rows: Sequence[Row]
    forward: Callable[[Sequence[Row], int], None]
    mask: Callable[[str, Sequence[Row]], Tensor | None] | None = None
    feeds_next: bool = False
    spatial: bool = False
    samples: int | None = None
    final: Callable[[Sequence[Row], int], Tensor] | None = None
    gradients: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def is_denoiser(self) -> bool:
        """Whether its final outputs are the model's, so that steps can train it."""
        return self.final is not None and bool(self.sites) and not self.feeds_next

    def at(self, places: Sequence[int]) -> list[Row]:
        """The rows at these places among its own."""
        return [self.rows[place] for place in places]

    @property
    def costliest_loads(self) -> Loads:
        """What is loaded in the row in which that takes the most memory."""

        def cost(loads: Loads) -> tuple[bool, bool, int]:
            return bool(phantoms(loads)), strength_of(loads) != 1, len(loads)

        return max((row.loaded for row in self.rows), key=cost)


class Host(Protocol):
    pictures: bool
    """True for image models, in which two concepts rarely compete for the same region. In language
    models they compete for every word."""
    interrupts: tuple[type[Exception], ...] = ()
    """Exceptions by which an application cancels a merge, beside those of ``on_progress``."""

    def sites(self) -> Mapping[str, nn.Module]:
        """Every module that a LoRA may change, by site name."""
        ...

    def weight(self, site: str) -> Tensor:
        """The weight of a site as forwards use it, float32, on the CPU. Raises :class:`BaseError`
        if it cannot be read."""
        return plain_weight(site, self.sites()[site], "An extraction")

    def read_lora(self, path: str | Path, options: ReadOptions | None = None) -> Lora:
        """The LoRA in the file ``path``, in any layout that the host's ecosystem knows, read as
        ``options`` say. Raises :class:`LoraFileError` for a file that does not fit."""
        ...

    def samples(self, request: SampleRequest) -> Any:
        """The rows of a ``request``, on which features are collected; opaque outside the host."""
        ...

    def added(self, concepts: Sequence[Concept], calibration: Calibration) -> Sequence[Concept]:
        """Extra concepts of a merge, without a LoRA of their own: generic prompts or inputs that
        preserve the base (``calibration.generic``), followed by composites
        (``calibration.composites``), whose rows load their parts. May be empty."""
        return []

    def activate(
        self, triggers: Sequence[EmbeddingTriggers]
    ) -> AbstractContextManager[Sequence[Set[str]]]:
        """Context in which each concept's prompts have the embeddings of its ``triggers`` active;
        yields the names of the active ones, by concept."""
        return nullcontext([set() for _ in triggers])

    def streams(self, sites: Set[str]) -> Mapping[str, nn.Module]:
        """Sites whose output is added to a residual stream, each with the module whose input is
        that stream. Those not among ``sites`` are suggested as repair sites: a change there removes
        drift that earlier sites left. May be empty."""
        ...

    def stages(self, samples: Any, sites: Set[str]) -> Iterator[Stage]:
        """The stages of these ``samples`` that reach ``sites``. All rows of one must be run before
        the next."""
        ...

    def free_memory(self, wanted: int) -> int:
        """Bytes that the most recent stage may use beyond the model. An application that keeps
        other data in memory first tries to free ``wanted`` bytes."""
        ...


def check_model(model: nn.Module) -> None:
    """Raise :class:`ModelStateError` if peft's layers replace the model's own, or if it comes from
    torch.compile, which ignores later hooks."""
    name = type(getattr(model, "_orig_mod", model)).__name__
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ModelStateError(
                f"{name} is compiled (torch.compile), which hides its layers. Reload the pipeline, "
                "and compile it after the merge."
            )
        if path.endswith(".base_layer"):
            raise ModelStateError(
                f"{name} has adapters loaded; a merge needs the plain base model. Unload them "
                "(pipeline.unload_lora_weights() or model.unload()), or reload it."
            )


def check_ready(model: nn.Module) -> None:
    """Raise :class:`IterisError` if dropout would randomise forwards, if adapters were added since
    :func:`check_model`, or if diffusers offloads the model by blocks: a row that leaves a block
    would take its weights off the device while other rows still wait in it."""
    check_model(model)
    for module in model.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        config = getattr(hooks.get("group_offloading"), "config", None)
        if getattr(config, "offload_type", None) == "block_level":  # an enumeration of strings
            raise ModelStateError(
                f"{type(model).__name__} is offloaded in groups of blocks, whose weights leave the "
                'device while rows wait in a block; offload it with offload_type="leaf_level", or '
                "by enable_model_cpu_offload()."
            )
    if any(getattr(m, "gradient_checkpointing", False) is True for m in model.modules()):
        raise ModelStateError(
            f"{type(model).__name__} has gradient checkpointing on, which runs its blocks again "
            "without a merge's changes; call its disable_gradient_checkpointing() first."
        )
    if model.training:
        raise ModelStateError(
            f"{type(model).__name__} is in training mode, so dropout randomises its output; call "
            "its eval() first."
        )
