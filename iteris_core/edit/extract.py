"""``extract_lora``: the difference between a fine-tune and its base, as a LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..activations.lockstep import Lockstep
from ..activations.site import site_of
from ..architectures.sites import weight_shape
from ..calibration import Calibration
from ..calibration_prompts import CAPTIONS
from ..concepts import Concept
from ..errors import MismatchError, SolveError, brief
from ..hosts.protocol import SAMPLES_AT_ONCE, Host, SampleRequest
from ..lora import Lora, LowRank, SiteChanges
from ..lora_files import BaseModel
from ..passes.held_out import WHAT, FinalOutputs, error_of, held_out
from ..passes.job import Job
from ..progress import OnProgress
from ..settings import Budget
from ..solve.ranks import Components
from .resize import Reduced, fitted, job_of, look
from .target import Target, share_out, worth_share

_LEAST, _MOST = 64, 256
"""The smallest and largest number of components of a change to consider."""
_NAME = "extracted"
_SAMPLES, _TIMESTEPS, _MODELS = 8, 2, 3  # of the final comparison


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
    rescue: Callable[[Reduced], None] | None = None,
) -> Reduced:
    """The LoRA that turns ``base`` into ``tuned``, reduced to ``target``.

    The fine-tune runs on ``prompts`` (None: captions), and each layer's weight change is cut
    according to the layer's inputs there; ranks are shared out as in :func:`.resize.resize_lora`.
    Then every layer is refitted at its rank, on inputs that passed through the earlier layers, and
    the whole LoRA is compared with the fine-tune, whose biases, normalisations and embeddings no
    LoRA holds. Whatever that comparison raises, the LoRA is there, with a note: it is returned or,
    if the user cancels, ``rescue`` gets it and the exception goes on. ``kind`` decides the file's
    names. ``calibration``, ``itemsize``, ``on_progress`` and ``memory_budget`` are as in
    :func:`.resize.resize_lora`.

    Raises :class:`MismatchError`, naming the first key, if the architectures differ;
    :class:`SolveError` if the LoRA is no nearer to the fine-tune than the base is.
    """
    base_sites, tuned_sites = base.sites(), tuned.sites()
    for name in sorted(base_sites.keys() | tuned_sites.keys()):
        ours, theirs = (
            weight_shape(sites[name]) if name in sites else "nothing"
            for sites in (base_sites, tuned_sites)
        )
        if ours != theirs:
            raise MismatchError(
                f"The two models have different architectures: {name} is {ours} in the base and "
                f"{theirs} in the fine-tune. Give the base from which the fine-tune was made."
            )
    dense = differences(base, tuned)
    if not dense:
        raise MismatchError(
            "The two models have the same layer weights; there is nothing to extract."
        )
    sites = {name: site_of(name, tuned_sites[name]) for name in dense}
    zeros = {name: site.zero(1) for name, site in sites.items()}
    concept = Concept(Lora(zeros, _NAME), prompts=prompts or CAPTIONS, trigger=_NAME)
    unchanged = {name: SiteChanges((change,)) for name, change in zeros.items()}
    job = job_of(tuned, concept, unchanged, calibration, on_progress, memory_budget)
    if refused := job.trace.refused:
        first, why = min(refused.items())
        raise MismatchError(f"{len(refused)} layers cannot be observed, such as {first}: it {why}.")
    _expect_comparison(job)
    most = _MOST if target.rank is None else min(_MOST, max(_LEAST, 4 * target.rank))

    def components_of(name: str, root: Tensor | None, output: float) -> Components:
        return Components.of_dense(dense[name], root, output, most, sites[name].kernel)

    with job.run() as run:
        components = look(run, components_of)
    ranks = share_out(components, target, itemsize)
    whole = {
        name: SiteChanges((LowRank.whole(change, sites[name].kernel),))
        for name, change in dense.items()
    }
    job = replace(job, host=base, changes=whole)
    job.generator.manual_seed(job.calibration.seed)
    with job.run() as run:
        changes = fitted(run, {name: rank for name, rank in ranks.items() if rank})
    found = Reduced(Lora(changes, _NAME, base=kind), ranks, worth_share(components, ranks))
    try:
        error = output_error(job, tuned, found.lora)
    except BaseException as failed:
        stops = isinstance(failed, (KeyboardInterrupt, *job.host.interrupts)) or job.eta.cancelled
        found = replace(found, uncompared="stopped" if stops else brief(failed))
        if isinstance(failed, Exception) and not stops:
            return found
        if rescue is not None:
            rescue(found)
        raise
    if not error < 1:
        raise SolveError(
            f"The LoRA is no nearer to the fine-tune than the base is (error {error:.2f}); use a "
            "larger rank, or prompts that show what it was tuned for."
        )
    return replace(found, error=error)


def output_error(job: Job, tuned: Host, lora: Lora) -> float:
    """‖f_LoRA − f_tuned‖ / ‖f_base − f_tuned‖ of final outputs: 0 is perfect, 1 like the base, the
    host of the ``job``."""
    separate = held_out(job.calibration, _SAMPLES, _TIMESTEPS)
    generator = torch.Generator().manual_seed(separate.seed)
    tick = partial(job.bare, f"denoising {WHAT}")
    with torch.no_grad(), Lockstep({}, {}) as lockstep:
        at_once = job.at_once(SAMPLES_AT_ONCE, 2 if separate.guidance > 1 else 1)
        given = job.concepts, separate, lockstep, generator, tick, None, at_once
        final = FinalOutputs(tuned, tuned.samples(SampleRequest(*given, held_out=True)))
        final.at_once = job.at_once(final.at_once, factors=1)
        outputs: list[Mapping[int, Tensor]] = []
        for host, changes in ((tuned, {}), (job.host, {}), (job.host, lora.sites)):
            job.tick(WHAT, len(outputs), _MODELS)
            outputs.append(replace(final, host=host).under(changes))
        job.tick(WHAT, _MODELS, _MODELS)
    of_tuned, of_base, of_lora = outputs
    return math.sqrt(error_of(of_lora, of_base, of_tuned))


def _expect_comparison(job: Job) -> None:
    """Expect the work of :func:`output_error`."""
    separate = held_out(job.calibration, _SAMPLES, _TIMESTEPS)
    rows = separate.samples * separate.rows_each
    each = job.trace.stages[-1].products if job.trace.stages else 0.0
    denoised = separate.samples * separate.denoising_steps
    job.eta.expect(WHAT, [each * (denoised + rows), *[each * rows] * (_MODELS - 1)])


def differences(base: Host, tuned: Host) -> dict[str, Tensor]:
    """Site → W_tuned − W_base, (out, in·kh·kw), float32, on the CPU, where it is not zero."""
    changes = ((name, tuned.weight(name) - base.weight(name)) for name in base.sites())
    return {name: change.flatten(1) for name, change in changes if bool(change.any())}
