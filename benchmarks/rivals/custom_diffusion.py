"""Custom Diffusion's constrained merge (Kumari et al., CVPR 2023, arXiv 2212.04488, eqs. 5 and 6).

On cross-attention key and value sites the merged change gives exactly what each LoRA gives on the
tokens of its own concept, and moves the text of everyday captions least:

    ΔW = V (D Cᵀ)⁻¹ D,   D = C (C_regᵀ C_reg)⁻¹,

C the target tokens, V = ΔW_i C_iᵀ what the LoRAs add there, C_reg the captions' tokens. Custom
Diffusion trains nothing else; the other sites of a LoRA get the mean here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iteris_core.activations.tokens import Observation
from iteris_core.concepts import Concept
from iteris_core.errors import BaseError, MismatchError
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.protocol import SampleRequest
from iteris_core.linalg import truncate_matrix
from iteris_core.lora import SiteChanges
from iteris_core.methods.linear import LinearSettings, average
from iteris_core.methods.registry import AtSite, micro_batch_setting, on_model
from iteris_core.passes.batches import ExecutionConfig, micro_batches
from iteris_core.passes.job import Job, Merged
from iteris_core.settings import Settings, setting
from iteris_core.solve.problem import Solution


@dataclass(frozen=True)
class CustomDiffusionSettings(Settings):
    ridge: float = setting(
        1e-6, "α on C_regᵀC_reg and on the constraints, relative to their norms.", above=0, below=1
    )
    micro_batch: int = micro_batch_setting()


@on_model("custom-diffusion", CustomDiffusionSettings)
def custom_diffusion(job: Job, settings: CustomDiffusionSettings) -> Merged:
    """Constrained least squares on cross-attention keys and values (CVPR 2023)."""
    targets = [site for site in job.changes if site.endswith(("attn2.to_k", "attn2.to_v"))]
    if not targets:
        raise MismatchError(
            "Custom Diffusion merges cross-attention keys and values, and none of these LoRAs "
            "changes any; use another method."
        )
    merged: dict[str, Solution] = {}
    weights = [0.0 if c.lora is None else c.weight for c in job.concepts]
    for site, changes in job.changes.items():
        change, _ = average(AtSite(changes, weights, job.generator), LinearSettings())
        merged[site] = Solution(change)
    subjects = [
        replace(concept, prompts=[concept.subject or next(iter(concept.prompts or [""]))])
        for concept in job.concepts
    ]
    said = [next(iter(subject.prompts or [""])) for subject in subjects]
    counts = _token_counts(job, said)
    texts, rows = _texts(job, subjects, targets, settings.micro_batch)
    # The words of the concept and the end token; the start token is the same for every text.
    words = {
        site: [prompts[0][1:count] for prompts, count in zip(concepts, counts, strict=True)]
        for site, concepts in texts.items()
    }
    texts, more_rows = _texts(job, job.concepts, targets, settings.micro_batch)
    captions = {site: [torch.cat(prompts) for prompts in texts[site]] for site in targets}
    for site in targets:
        changes = job.changes[site]
        dense = _constrained(changes, words[site], captions[site], settings.ridge)
        rank = min(sum(len(tokens) for tokens in words[site]), *changes.shape)
        change, lost = truncate_matrix(dense, rank, like=changes.like)
        merged[site] = Solution(change, truncated=lost)
    job.report.rows = max(rows, more_rows)
    return Merged(merged)


def _token_counts(job: Job, prompts: Sequence[str]) -> list[int]:
    """How many tokens each concept's prompt has, with start and end and without padding."""
    if not isinstance(job.host, DiffusersHost):
        raise BaseError(f"Custom Diffusion needs prompts; {type(job.host).__name__} has none.")
    tokenizer = job.host.pipeline.tokenizer
    texts = list(map(job.host._said, range(len(prompts)), prompts))
    encoded = tokenizer(texts, truncation=True, max_length=tokenizer.model_max_length)
    return [len(ids) for ids in encoded.input_ids]


def _constrained(
    changes: SiteChanges, targets: Sequence[Tensor], captions: Sequence[Tensor], ridge: float
) -> Tensor:
    """ΔW, (out, in), float64; ``targets`` and ``captions`` are (tokens, in) of each concept."""
    out, _ = changes.shape
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


def _texts(
    job: Job, concepts: Sequence[Concept], sites: Sequence[str], size: int
) -> tuple[dict[str, list[list[Tensor]]], int]:
    """The inputs of ``sites`` on the concepts' prompts: (tokens, in) of each prompt, by concept;
    and how many rows ran."""
    texts, rows = defaultdict[tuple[str, int], list[Tensor]](list), 0
    reached = set(sites) | {site for site in job.changes if site.startswith("text_encoder")}
    calibration = replace(job.calibration, empty_share=0.0, contexts=0.0)

    def keep(shown: Observation) -> None:
        texts[shown.name, shown.concept].extend(shown.inputs[0].float())

    with job.run() as run:
        lockstep = run.lockstep
        fields = concepts, calibration, lockstep, job.generator, job.tick
        samples = job.host.samples(SampleRequest(*fields))
        for stage in job.host.stages(samples, reached):
            rows = max(rows, len(stage.rows))
            for batch in micro_batches(stage, 1, keep, ExecutionConfig(size)):
                lockstep.run(batch)
    each = range(len(job.concepts))
    found = {site: [texts[site, concept] for concept in each] for site in sites}
    return found, rows
