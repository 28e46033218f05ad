"""Custom Diffusion's constrained merge (Kumari et al., CVPR 2023, arXiv 2212.04488, eqs. 5 and 6).

On cross-attention key and value sites the merged change gives exactly what each LoRA gives on the
tokens of its own concept, and moves the text of everyday captions least:

    ΔW = V (D Cᵀ)⁻¹ D,   D = C (C_regᵀ C_reg)⁻¹,

C the target tokens, V = ΔW_i C_iᵀ what the LoRAs add there, C_reg the captions' tokens. Custom
Diffusion trains nothing else; the other sites of a LoRA get the mean here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..activations.tokens import Visit
from ..concepts import Concept
from ..errors import IterisError
from ..linalg.lowrank import factorize
from ..lora import LowRank
from ..passes.batches import Batching, micro_batches
from ..passes.job import Job
from ..report.report import SiteReport
from ..settings import Settings, setting
from .linear import LinearSettings, average
from .registry import ROWS_PER_FORWARD, Merged, method


@dataclass(frozen=True)
class CustomDiffusionSettings(Settings):
    ridge: float = setting(
        1e-6,
        "α on C_regᵀC_reg and on the constraints, relative to their norms.",
        above=0,
        below=1,
    )
    micro_batch: int = setting(32, ROWS_PER_FORWARD, low=1)


@method("custom-diffusion", CustomDiffusionSettings, needs_host=True)
def custom_diffusion(job: Job, settings: CustomDiffusionSettings) -> Merged:
    """Constrained least squares on cross-attention keys and values (CVPR 2023)."""
    assert job.host is not None
    targets = [site for site in job.references if site.endswith(("attn2.to_k", "attn2.to_v"))]
    if not targets:
        raise IterisError(
            "Custom Diffusion merges cross-attention keys and values, and none of these LoRAs "
            "changes any; use another method."
        )
    merged = dict(average(job, LinearSettings()))
    features = _Features()
    subjects = [
        replace(concept, prompts=[concept.subject or next(iter(concept.prompts or [""]))])
        for concept in job.concepts
    ]
    counts = job.host.token_counts([next(iter(subject.prompts or [""])) for subject in subjects])
    rows = _collect(job, subjects, targets, features, settings.micro_batch)
    # The words of the concept and the end token; the start token is the same for every text.
    target_tokens = {
        site: [part[0, 1:count] for part, count in zip(parts, counts, strict=True)]
        for site, parts in rows.items()
    }
    rows = _collect(job, job.concepts, targets, features, settings.micro_batch)
    captions = {site: [part.flatten(0, 1) for part in parts] for site, parts in rows.items()}
    for site in targets:
        changes = job.references[site]
        dense = _constrained(changes, target_tokens[site], captions[site], settings.ridge)
        present = [change for change in changes if change is not None]
        rank = min(sum(len(t) for t in target_tokens[site]), *present[0].shape)
        change, lost = factorize(dense, rank, like=present[0])
        merged[site] = change, SiteReport(change.rank, truncated=lost)
    return merged


def _constrained(
    changes: Sequence[LowRank | None],
    targets: Sequence[Tensor],
    captions: Sequence[Tensor],
    ridge: float,
) -> Tensor:
    """ΔW, (out, in), float64; ``targets`` and ``captions`` are (tokens, in) of each concept."""
    out = next(change.shape[0] for change in changes if change is not None)
    regular = torch.cat(list(captions)).double()
    gram = regular.mT @ regular
    gram.diagonal().add_(ridge * gram.norm())
    tokens = torch.cat(list(targets)).double()
    values = [
        torch.zeros(len(part), out, dtype=torch.float64, device=part.device)
        if change is None
        else part.double() @ change.down.double().mT @ change.up.double().mT
        for change, part in zip(changes, targets, strict=True)
    ]
    direction = torch.linalg.solve(gram, tokens.mT).mT  # D
    inner = direction @ tokens.mT
    inner.diagonal().add_(ridge * inner.norm())
    return torch.cat(values).mT @ torch.linalg.solve(inner, direction)


class _Features:
    """A visitor that keeps the inputs of the sites: text tokens, the same for all of them."""

    def __init__(self) -> None:
        self.found: dict[str, dict[int, list[Tensor]]] = {}

    def visit(self, visit: Visit) -> None:
        site = self.found.setdefault(visit.site, {})
        for concept, start, stop in visit.spans:
            site.setdefault(concept, []).append(visit.inputs[start:stop].float())


def _collect(
    job: Job, concepts: Sequence[Concept], sites: list[str], features: _Features, size: int
) -> dict[str, list[Tensor]]:
    """What reaches ``sites`` on the concepts' prompts, (prompts, tokens, in) for each concept."""
    assert job.host is not None
    features.found = {}
    wanted = set(sites) | {site for site in job.references if site.startswith("text_encoder")}
    with job.lockstep() as lockstep:
        samples = job.host.samples(
            concepts,
            wanted,
            replace(job.calibration, empty_share=0.0),
            lockstep,
            job.generator,
            job.tick,
        )
        for stage in job.host.stages(samples, wanted):
            job.rows = max(job.rows, len(stage.owners))
            for batch in micro_batches(stage, 1, features, Batching(size)):
                lockstep.run(batch)
    return {
        site: [torch.cat(features.found[site][concept]) for concept in range(len(job.concepts))]
        for site in sites
    }
