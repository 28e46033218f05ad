"""Tokens that count more where a LoRA acts (iteris_core/activations/tokens.py)."""

from collections import defaultdict

import torch
from reductions import solver_of
from test_diffusers_host import CALIBRATION, PROMPTS
from tiny import is_attention, random_lora

from iteris_core import Concept
from iteris_core.passes.batches import ExecutionConfig, micro_batches
from iteris_core.passes.changes import changes_of
from iteris_core.passes.collect import Collector
from iteris_core.passes.job import Job
from iteris_core.solve.choose import THRESHOLDS
from iteris_core.solve.problem import RegressionSpec

FOCUS = 0.7


def concepts_of(host, seeds=(1, 2, 3)):
    return [Concept(random_lora(host, s), prompts=PROMPTS, trigger=f"s{s}") for s in seeds]


class Recorder:
    """Every site's tokens and the effect of its changes, with dense products."""

    def __init__(self, references, inner):
        self.references, self.inner = references, inner
        self.seen = []

    def observe(self, shown):
        self.inner.observe(shown)
        tokens = shown.site.tokens(shown.inputs[0]).double()
        change = self.references[shown.name][shown.concept].dense().double()
        effect = (tokens @ change.mT).square().sum(1).reshape(shown.inputs.shape[1], -1)
        self.seen.append((shown.name, shown.concept, tokens, effect))


def test_moments_are_weighted_by_the_effects_so_far(host64):
    concepts = concepts_of(host64)
    references = {
        site: [c.lora.sites[site] for c in concepts]
        for site in host64.sites()
        if is_attention(site)
    }
    generator = torch.Generator().manual_seed(0)
    changes = {site: some for site, some in changes_of(concepts).items() if site in references}
    task = Job(host64, concepts, changes, CALIBRATION, generator, lambda *_: None)
    acting = set(references) & set(host64.streams(set(references)))
    assert acting
    fit = RegressionSpec([1.0] * 3, 1e-6)
    with task.run() as run:
        collector = Collector(
            solver_of(
                lambda opening: THRESHOLDS.choose(opening, fit, "output"),
                dtype=torch.float64,
                acting=acting,
            ),
        )
        recorder = Recorder(references, collector)
        for stage in run.stages():
            assert stage.spatial == (stage.name == "unet")
            recorder.seen.clear()
            for batch in micro_batches(
                stage, 1, recorder.observe, ExecutionConfig(100, saliency=FOCUS)
            ):
                run.lockstep.run(batch)
    effects = defaultdict(list)
    unequal, wanted = 0, defaultdict(dict)
    for site, concept, tokens, effect in recorder.seen:
        rows, length = effect.shape
        if site in acting:
            effects[concept, length].append(effect / effect.mean(1, keepdim=True))
        weights = torch.ones(rows, length, dtype=torch.float64)
        if effects[concept, length]:
            unequal += concept == 0
            weights = 1 - FOCUS + FOCUS * torch.stack(effects[concept, length]).mean(0)
        wanted[site][concept] = tokens.mT @ (tokens * weights.reshape(-1, 1))
    for site, of_concepts in wanted.items():
        inputs = collector.take(site).inputs
        inputs.complete()
        assert len(of_concepts) == 3
        for concept, moment in of_concepts.items():
            torch.testing.assert_close(inputs.own[concept], moment)
    assert unequal > len(acting)
