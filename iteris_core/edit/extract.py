"""``extract_lora``: what a fine-tune changes of its base, as a LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from ..lora_files import BaseModel
from ..passes.eta import Eta
from ..passes.job import Job
from ..passes.preflight import unmergeable_sites
from ..progress import OnProgress
from ..solve.ranks import Components, Target, kept, share_out
from .held import output_error
from .moments import Seen, calibration_of, look
from .resize import fitted

_LEAST, _MOST = 64, 256
"""The least and the largest number of components of a change that are looked at."""
_NAME = "extracted"


@dataclass(frozen=True)
class Extracted:
    """``error`` is what the LoRA lacks of the fine-tune, as a share of what that changes:
    ‖f_LoRA − f_tuned‖ / ‖f_base − f_tuned‖ of final outputs, on rows that nothing was fitted to.
    ``kept`` is of the change's worth at the outputs of its layers."""

    lora: Lora
    ranks: Mapping[str, int]
    kept: float
    error: float

    def summary(self) -> str:
        used = [rank for rank in self.ranks.values() if rank]
        return (
            f"{len(used)} layers at ranks {min(used)} to {max(used)}; error {self.error:.1%} of "
            "what the fine-tune changes."
        )


def extract_lora(
    base: Host,
    tuned: Host,
    target: Target,
    kind: BaseModel | None = None,
    *,
    prompts: Sequence[str] | None = None,
    calibration: Calibration | Mapping[str, Any] | None = None,
    itemsize: int = 2,
    on_progress: OnProgress | None = None,
    memory_budget: int | Literal["free"] | None = "free",
) -> Extracted:
    """The LoRA that makes of ``base`` what ``tuned`` is, brought to ``target``.

    The fine-tune runs on ``prompts`` (None: captions), and each layer's change of weight is cut by
    what the layer sees there; the ranks are shared out as by :func:`.resize.resize_lora`. Then
    every layer is fitted anew at its rank on inputs that passed the layers before, and the whole
    LoRA is held against the fine-tune. ``kind`` says what names the file is to have.

    Raises :class:`MismatchError` where the two are not of one architecture, naming the first key;
    :class:`SolveError` where the LoRA is no nearer to the fine-tune than the base.
    """
    eta = Eta(on_progress)
    tick = eta.forecast.tick
    check_alike(_shapes(base.sites()), _shapes(tuned.sites()))
    dense = differences(base, tuned)
    if not dense:
        raise MismatchError("The two models have the same weights; there is nothing to extract.")
    sites = {name: site_of(name, tuned.sites()[name]) for name in dense}
    chosen = calibration_of(calibration)
    nothing = Lora({name: site.zero(1) for name, site in sites.items()}, _NAME)
    concept = Concept(nothing, prompts=prompts or CAPTIONS, trigger=_NAME)

    def job_on(host: Host, changes: Mapping[str, LowRank]) -> Job:
        generator = torch.Generator().manual_seed(chosen.seed)
        of = {name: SiteChanges((change,)) for name, change in changes.items()}
        return Job(host, [concept], of, chosen, generator, tick,
                   memory_budget=memory_budget, eta=eta)  # fmt: skip

    found = _components(job_on(tuned, nothing.sites), dense, sites, target)
    ranks = share_out(found, target, itemsize)
    cut = {name: one.at(ranks[name]) for name, one in found.items() if ranks[name]}
    whole = {name: LowRank.whole(dense[name], sites[name].kernel) for name in dense}
    job = job_on(base, whole)
    with job.run() as run:
        cut |= fitted(job, run, {name: ranks[name] for name in cut})
    error = output_error(base, tuned, concept, cut, chosen, tick)
    if not error < 1:
        raise SolveError(
            f"The LoRA is no nearer to the fine-tune than the base is (error {error:.2f}); take a "
            "larger rank, or prompts that show what it was tuned for."
        )
    return Extracted(Lora(cut, _NAME, base=kind), ranks, kept(found, ranks), error)


def _components(
    job: Job, dense: Mapping[str, Tensor], sites: Mapping[str, Site], target: Target
) -> dict[str, Components]:
    found: dict[str, Components] = {}
    most = _MOST if target.rank is None else min(_MOST, max(_LEAST, 4 * target.rank))

    def visit(name: str, seen: Seen) -> None:
        kernel = sites[name].kernel
        found[name] = Components.of_dense(dense[name], seen.root, seen.output, most, kernel)

    blind, _ = unmergeable_sites(job, sweep=True)
    if blind:
        first = min(blind)
        raise MismatchError(
            f"{len(blind)} layers cannot be seen, such as {first}: it {blind[first]}."
        )
    with job.run() as run:
        look(run, visit)
    return found


def check_alike(base: Mapping[str, tuple[int, ...]], tuned: Mapping[str, tuple[int, ...]]) -> None:
    """Raise :class:`MismatchError` naming the first key that one lacks or has in another shape."""
    for name in sorted(base.keys() | tuned.keys()):
        one, two = base.get(name), tuned.get(name)
        if one != two:
            shapes = f"{one or 'nothing'} in the base and {two or 'nothing'} in the fine-tune"
            raise MismatchError(
                f"The two models are not of one architecture: {name} is {shapes}. Give the base "
                "that the fine-tune was made from."
            )


def differences(base: Host, tuned: Host) -> dict[str, Tensor]:
    """Site → W_tuned − W_base, (out, in·kh·kw), float32, on the CPU, where that is not zero. Raises
    :class:`BaseError` for weights that cannot be read."""
    found: dict[str, Tensor] = {}
    for name in base.sites():
        change = tuned.weight(name) - base.weight(name)
        if bool(change.any()):
            found[name] = change.flatten(1)
    return found


def _shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    return {name: weight_shape(module) for name, module in modules.items()}


def other_differences(
    base: Mapping[str, nn.Module], tuned: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Differences of two models beside the weights of their layers, tuned less base, by component
    and name: normalisations, biases, embeddings."""
    found: dict[str, Tensor] = {}
    for component, model in base.items():
        other = dict(tuned[component].named_parameters())
        kinds = nn.Linear | nn.Conv2d
        sites = {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, kinds)}
        for name, value in model.named_parameters():
            if name not in sites and name in other and other[name].shape == value.shape:
                change = (other[name].detach().float() - value.detach().float()).cpu()
                if bool(change.any()):
                    found[f"{component}.{name}"] = change
    return found
