"""``extract_lora``: the difference between a fine-tune and its base, as a LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..activations.site import Site, site_of
from ..architectures.sites import weight_shape
from ..calibration_prompts import CAPTIONS
from ..concepts import Calibration, Concept
from ..errors import MismatchError, SolveError
from ..hosts.protocol import Host
from ..lora import Lora, LowRank, SiteChanges
from ..lora_files import BaseModel, Layout
from ..lora_files.vectors import placed
from ..passes.job import Job
from ..passes.preflight import unmergeable_sites
from ..progress import Forecast, OnProgress
from ..solve.ranks import Components, Target, kept, share_out, span
from .held import output_error
from .moments import Seen, calibration_of, look
from .resize import fitted
from .vectors import other_differences, with_vectors

_LEAST, _MOST = 64, 256
"""The smallest and largest number of components of a change to consider."""
_NAME = "extracted"


@dataclass(frozen=True)
class Extracted:
    """``error`` is the share of the fine-tune's effect that the LoRA lacks: ‖f_LoRA − f_tuned‖ /
    ‖f_base − f_tuned‖ of final outputs, on rows to which nothing was fitted. ``kept`` is the share
    of the change's worth at its layers' outputs. ``left`` are differing parameters without a place
    in the file: embeddings, and in many layouts biases and normalisations."""

    lora: Lora
    ranks: Mapping[str, int]
    kept: float
    error: float
    left: tuple[str, ...] = ()

    def summary(self) -> str:
        used = [rank for rank in self.ranks.values() if rank]
        exact = len(self.lora.vectors)
        beside = f", {exact} biases and normalisations exactly" if exact else ""
        text = (
            f"{len(used)} layers at {span(used)}{beside}; error "
            f"{self.error:.1%} of what the fine-tune changes."
        )
        if not self.left:
            return text
        return (
            f"{text} {len(self.left)} differing parameters have no place in the file (biases, "
            f"normalisations, embeddings), such as {self.left[0]}."
        )


def extract_lora(
    base: Host,
    tuned: Host,
    target: Target,
    kind: BaseModel | None = None,
    *,
    layout: Layout | None = None,
    prompts: Sequence[str] | None = None,
    calibration: Calibration | Mapping[str, Any] | None = None,
    itemsize: int = 2,
    on_progress: OnProgress | None = None,
    memory_budget: int | Literal["free"] | None = "free",
) -> Extracted:
    """The LoRA that turns ``base`` into ``tuned``, reduced to ``target``.

    The fine-tune runs on ``prompts`` (None: captions), and each layer's weight change is cut
    according to the layer's inputs there; ranks are shared out as in :func:`.resize.resize_lora`.
    Then every layer is refitted at its rank, on inputs that passed through the earlier layers, and
    the whole LoRA is compared with the fine-tune. ``kind`` and ``layout`` decide the file's names,
    and therefore which biases and normalisations it can contain; those are stored in full.

    Raises :class:`MismatchError`, naming the first key, if the architectures differ;
    :class:`SolveError` if the LoRA is no nearer to the fine-tune than the base is.
    """
    eta = Forecast(on_progress)
    tick = eta.tick
    check_alike(_shapes(base.sites()), _shapes(tuned.sites()))
    dense = differences(base, tuned)
    if not dense:
        raise MismatchError(
            "The two models have the same layer weights; there is nothing to extract."
        )
    others = other_differences(base, tuned)
    # As the writer chooses by default
    keys = kind.vectors if kind is not None and kind.written and layout != "peft" else {}
    vectors = {name: others[name] for name in sorted(placed(others, keys))}
    sites = {name: site_of(name, tuned.sites()[name]) for name in dense}
    chosen = calibration_of(calibration)
    nothing = Lora({name: site.zero(1) for name, site in sites.items()}, _NAME)
    concept = Concept(nothing, prompts=prompts or CAPTIONS, trigger=_NAME)

    def job_on(host: Host, changes: Mapping[str, LowRank]) -> Job:
        generator = torch.Generator().manual_seed(chosen.seed)
        of = {name: SiteChanges((change,)) for name, change in changes.items()}
        return Job(host, [concept], of, chosen, generator, tick,
                   memory_budget=memory_budget, eta=eta)  # fmt: skip

    size = itemsize * sum(vector.numel() for vector in vectors.values()) / 1e6
    if target.megabytes is not None and vectors:
        target = replace(target, megabytes=target.megabytes - size)
    job = _seen(job_on(tuned, nothing.sites))
    found = _components(job, dense, sites, target)
    ranks = share_out(found, target, itemsize)
    cut = {name: one.at(ranks[name]) for name, one in found.items() if ranks[name]}
    whole = {name: LowRank.whole(dense[name], sites[name].kernel) for name in dense}
    job = replace(job_on(base, whole), joined=job.joined)
    with with_vectors(base, vectors), job.run() as run:
        cut |= fitted(job, run, {name: ranks[name] for name in cut})
    made = Lora(cut, _NAME, base=kind, vectors=vectors)
    error = output_error(base, tuned, concept, made, chosen, tick)
    if not error < 1:
        raise SolveError(
            f"The LoRA is no nearer to the fine-tune than the base is (error {error:.2f}); use a "
            "larger rank, or prompts that show what it was tuned for."
        )
    left = tuple(name for name in others if name not in vectors)
    return Extracted(made, ranks, kept(found, ranks), error, left)


def _components(
    job: Job, dense: Mapping[str, Tensor], sites: Mapping[str, Site], target: Target
) -> dict[str, Components]:
    found: dict[str, Components] = {}
    most = _MOST if target.rank is None else min(_MOST, max(_LEAST, 4 * target.rank))

    def visit(name: str, seen: Seen) -> None:
        kernel = sites[name].kernel
        found[name] = Components.of_dense(dense[name], seen.root, seen.output, most, kernel)

    with job.run() as run:
        look(run, visit)
    return found


def _seen(job: Job) -> Job:
    """``job``, after checking that all its layers can be observed. Raises :class:`MismatchError`,
    naming one that cannot."""
    looked = unmergeable_sites(job, sweep=True)
    if looked.refused:
        first = min(looked.refused)
        raise MismatchError(
            f"{len(looked.refused)} layers cannot be observed, such as {first}: it "
            f"{looked.refused[first]}."
        )
    return replace(job, joined=looked.joined)


def check_alike(base: Mapping[str, tuple[int, ...]], tuned: Mapping[str, tuple[int, ...]]) -> None:
    """Raise :class:`MismatchError` naming the first key that is missing in one or differs in
    shape."""
    for name in sorted(base.keys() | tuned.keys()):
        one, two = base.get(name), tuned.get(name)
        if one != two:
            shapes = f"{one or 'nothing'} in the base and {two or 'nothing'} in the fine-tune"
            raise MismatchError(
                f"The two models have different architectures: {name} is {shapes}. Give the base "
                "from which the fine-tune was made."
            )


def differences(base: Host, tuned: Host) -> dict[str, Tensor]:
    """Site → W_tuned − W_base, (out, in·kh·kw), float32, on the CPU, for nonzero differences.
    Raises :class:`BaseError` for weights that cannot be read."""
    found: dict[str, Tensor] = {}
    for name in base.sites():
        change = tuned.weight(name) - base.weight(name)
        if bool(change.any()):
            found[name] = change.flatten(1)
    return found


def _shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    return {name: weight_shape(module) for name, module in modules.items()}
