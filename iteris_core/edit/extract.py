"""``extract_lora``: the difference between a fine-tune and its base, as a LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..activations.lockstep import Lockstep
from ..activations.site import site_of
from ..architectures.sites import weight_shape
from ..calibration_prompts import CAPTIONS
from ..concepts import Calibration, Concept
from ..errors import MismatchError, SolveError
from ..hosts.protocol import Host, SampleRequest, Tick
from ..lora import Lora, LowRank, SiteChanges
from ..lora_files import BaseModel
from ..passes.held_out import FinalOutputs, error_of, held_out
from ..passes.preflight import unmergeable_sites
from ..progress import OnProgress
from ..settings import Budget
from ..solve.ranks import Components, Target, kept, share_out
from .resize import Reduced, calibration_of, fitted, job_of, look

_LEAST, _MOST = 64, 256
"""The smallest and largest number of components of a change to consider."""
_NAME = "extracted"
_SAMPLES, _TIMESTEPS = 8, 2  # of the final comparison


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
    memory_budget: Budget = "free",
) -> Reduced:
    """The LoRA that turns ``base`` into ``tuned``, reduced to ``target``.

    The fine-tune runs on ``prompts`` (None: captions), and each layer's weight change is cut
    according to the layer's inputs there; ranks are shared out as in :func:`.resize.resize_lora`.
    Then every layer is refitted at its rank, on inputs that passed through the earlier layers, and
    the whole LoRA is compared with the fine-tune, whose biases, normalisations and embeddings no
    LoRA holds. ``kind`` decides the file's names.

    Raises :class:`MismatchError`, naming the first key, if the architectures differ;
    :class:`SolveError` if the LoRA is no nearer to the fine-tune than the base is.
    """
    base_sites, tuned_sites = base.sites(), tuned.sites()
    for name in sorted(base_sites.keys() | tuned_sites.keys()):
        one, two = (
            weight_shape(of[name]) if name in of else None for of in (base_sites, tuned_sites)
        )
        if one != two:
            shapes = f"{one or 'nothing'} in the base and {two or 'nothing'} in the fine-tune"
            raise MismatchError(
                f"The two models have different architectures: {name} is {shapes}. Give the base "
                "from which the fine-tune was made."
            )
    dense = differences(base, tuned)
    if not dense:
        raise MismatchError(
            "The two models have the same layer weights; there is nothing to extract."
        )
    sites = {name: site_of(name, tuned_sites[name]) for name in dense}
    nothing = {name: site.zero(1) for name, site in sites.items()}
    concept = Concept(Lora(nothing, _NAME), prompts=prompts or CAPTIONS, trigger=_NAME)
    chosen = calibration_of(calibration)
    unchanged = {name: SiteChanges((change,)) for name, change in nothing.items()}
    job = job_of(tuned, concept, unchanged, chosen, on_progress, memory_budget)
    looked = unmergeable_sites(job, sweep=True)
    if looked.refused:
        first = min(looked.refused)
        raise MismatchError(
            f"{len(looked.refused)} layers cannot be observed, such as {first}: it "
            f"{looked.refused[first]}."
        )
    job = replace(job, joined=looked.joined)
    most = _MOST if target.rank is None else min(_MOST, max(_LEAST, 4 * target.rank))

    with job.run() as run:
        found = look(
            run,
            lambda name, root, output: Components.of_dense(
                dense[name], root, output, most, sites[name].kernel
            ),
        )
    ranks = share_out(found, target, itemsize)
    whole = {
        name: SiteChanges((LowRank.whole(change, sites[name].kernel),))
        for name, change in dense.items()
    }
    job = replace(job, host=base, changes=whole)
    job.generator.manual_seed(chosen.seed)
    with job.run() as run:
        cut = fitted(job, run, {name: rank for name, rank in ranks.items() if rank})
    made = Lora(cut, _NAME, base=kind)
    error = output_error(base, tuned, concept, made, chosen, job.tick)
    if not error < 1:
        raise SolveError(
            f"The LoRA is no nearer to the fine-tune than the base is (error {error:.2f}); use a "
            "larger rank, or prompts that show what it was tuned for."
        )
    return Reduced(made, ranks, kept(found, ranks), error=error)


def output_error(
    base: Host, tuned: Host, concept: Concept, lora: Lora, calibration: Calibration, tick: Tick
) -> float:
    """‖f_LoRA − f_tuned‖ / ‖f_base − f_tuned‖ of final outputs: 0 is perfect, 1 like the base."""
    separate = held_out(calibration, _SAMPLES, _TIMESTEPS)
    generator = torch.Generator().manual_seed(separate.seed)
    with torch.no_grad(), Lockstep({}, {}) as lockstep:
        request = SampleRequest([concept], separate, lockstep, generator, tick, held_out=True)
        final = FinalOutputs.of(tuned, tuned.samples(request))
        wanted = final.under({})
        final = replace(final, host=base)
        before = final.under({})
        after = final.under(lora.sites)
    return math.sqrt(error_of(after, before, wanted))


def differences(base: Host, tuned: Host) -> dict[str, Tensor]:
    """Site → W_tuned − W_base, (out, in·kh·kw), float32, on the CPU, where it is not zero."""
    found: dict[str, Tensor] = {}
    for name in base.sites():
        change = tuned.weight(name) - base.weight(name)
        if bool(change.any()):
            found[name] = change.flatten(1)
    return found
