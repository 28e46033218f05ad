"""Rows of a subject in a style: their target, prompts and latents, and what they change."""

import math
from dataclasses import replace

import pytest
import torch
from oracle import SITES, ModuleHost, Net, difference, jacobi, make_data, make_lora
from small_merge import EXACT
from tiny import random_lora

from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.activations.rows import loads_of
from iteris_core.calibration_prompts import Composite, Wording, composites_of
from iteris_core.hosts.protocol import SampleRequest
from iteris_core.hosts.rows import SamplePrompts
from iteris_core.passes.changes import changes_of

WIDE = 1000  # a rank beyond every site's size: nothing is truncated
SUBJECT = Concept(Lora({}), trigger="sks", class_word="dog")
STYLE = Concept(Lora({}), trigger="zwx style", kind="style")
WORDS = ["apple", "bridge", "cloud"]


class StyledHost(ModuleHost):
    """Adds the composite of its first two concepts, with the last of its data, in whose rows both
    LoRAs are on."""

    def __init__(self, data, weight: float) -> None:
        super().__init__(Net(), data)
        self.weight = weight

    def added(self, concepts, calibration):
        return [Composite(None, ["unused"], weight=self.weight, parts=tuple(concepts[:2]))]

    def stages(self, samples, sites):
        for stage in super().stages(samples, sites):
            both = len(samples) - 1
            rows = [
                replace(row, loads=loads_of([0, 1])) if row.concept == both else row
                for row in stage.rows
            ]
            yield replace(stage, rows=rows)


def merged(loras, data, weight=0.3, method="iteris", strengths=(1.0, 1.0), **settings):
    concepts = [
        Concept(lora, prompts=["unused"], strength=strength)
        for lora, strength in zip(loras, strengths, strict=True)
    ]
    settings = {**EXACT, **settings} if method == "iteris" else settings
    return merge_loras(StyledHost(data, weight), concepts, method, settings=settings)


def both(one: Lora, two: Lora) -> Lora:
    """What the two change together, densely."""
    sites = {}
    for site in SITES:
        dense = one.sites[site].dense() + two.sites[site].dense()
        like = one.sites[site]
        sites[site] = type(like)(dense, torch.eye(dense.shape[1], dtype=dense.dtype), like.kernel)
    return Lora(sites)


@pytest.mark.parametrize("objective", ["adapter", "output"])
@pytest.mark.parametrize("weighting", ["adapter", "tokens", "full", "none"])
def test_a_composite_asks_for_what_both_loras_do(objective, weighting):
    loras, data = [make_lora(1), make_lora(2, rank=3)], make_data(3)
    settings = {"objective": objective, "weighting": weighting, "ridge": 1e-4}
    ours = merged(loras, data, schedule="jacobi", iterations=3, rank=WIDE, **settings)
    weights = [1.0, 1.0, 0.3]
    dense = jacobi(Net(), [*loras, both(*loras)], data, iterations=3, weights=weights, **settings)
    assert difference(ours.lora, dense) < 1e-8


@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_a_composite_adds_no_rank(objective):
    ours = merged([make_lora(1), make_lora(2, rank=3)], make_data(3), objective=objective)
    assert max(ours.lora.ranks) == 5


def test_the_parts_strengths_count():
    loras = [make_lora(1), make_lora(2, rank=3)]
    concepts = [
        Concept(loras[0], prompts=["a"], strength=0.5),
        Concept(loras[1], prompts=["b"], strength=-2.0),
    ]
    changes = changes_of([*concepts, Composite(None, ["ab"], parts=tuple(concepts))])
    for site, at in changes.items():
        wanted = 0.5 * loras[0].sites[site].dense() - 2 * loras[1].sites[site].dense()
        assert torch.allclose(at[2].dense(), wanted)
        assert (at.rank, at.listed_rank, set(at.own)) == (5, 10, {0, 1})


def made(concepts, rows=40, **values):
    wording = Wording(WORDS, concepts, torch.Generator().manual_seed(0))
    return composites_of(concepts, Calibration(**values), wording, rows)


def test_prompts_name_the_subject_and_then_the_style():
    (composite,) = made([SUBJECT, STYLE])
    assert composite.weight == Calibration().composites
    assert composite.name == "sks in zwx style"
    assert len(composite.prompts) == 40
    ends = ("sks dog", "zwx style")
    for prompt in composite.prompts:
        assert prompt.index(ends[0]) < prompt.index(ends[1])
    plain = [prompt for prompt in composite.prompts if prompt.endswith(ends[1])]
    assert 10 < len(plain) < 40  # others have words behind


def subjects_and_styles(subjects, styles, lora=lambda _: Lora({})):
    return [
        *(Concept(lora(i), trigger=f"sks{i}") for i in range(subjects)),
        *(Concept(lora(-i), trigger=f"st{i}", kind="style") for i in range(1, styles + 1)),
    ]


@pytest.mark.parametrize(
    ("subjects", "styles", "pairs", "weight"),
    [(1, 1, 1, 0.2), (3, 1, 3, 0.6), (2, 2, 4, 0.4), (5, 5, 10, 1.0), (15, 15, 30, 3.0),
     (2, 40, 42, 8.0)],
)  # fmt: skip
def test_all_composites_weigh_as_one_for_each_lora_of_the_larger_side(
    subjects, styles, pairs, weight
):
    concepts = subjects_and_styles(subjects, styles)
    composites = made(concepts)
    assert len({tuple(map(id, one.parts)) for one in composites}) == len(composites) == pairs
    assert sum(one.weight for one in composites) == pytest.approx(weight)
    assert {len(one.prompts) for one in composites} == {40}
    times = [sum(one.has(concept) for one in composites) for concept in concepts]
    assert max(times[:subjects]) - min(times[:subjects]) <= 1
    assert max(times[subjects:]) - min(times[subjects:]) <= 1
    assert min(times) > 0


@pytest.mark.parametrize(
    ("concepts", "values"),
    [
        ([SUBJECT, STYLE], {"composites": 0}),
        ([SUBJECT, SUBJECT], {}),
        ([SUBJECT, Concept(Lora({}), prompts=["zwx, a house", "zwx, a cat"], kind="style")], {}),
        ([SUBJECT, Concept.preserve(["a", "b"])], {}),
        ([SUBJECT, Concept(Lora({}, embeddings={"e": {}}), trigger="zwx", kind="style")], {}),
    ],
    ids=["weight 0", "no style", "a style without words", "no LoRA", "embeddings"],
)
def test_there_is_none(concepts, values):
    assert not made(concepts, **values)


def test_a_style_without_a_trigger_is_called_for_as_its_prompts_end():
    style = Concept(Lora({}), prompts=["a house in zwx style", "a cat in zwx style"], kind="style")
    (composite,) = made([SUBJECT, style])
    assert all("in zwx style" in prompt for prompt in composite.prompts)
    assert any(prompt.endswith("sks dog in zwx style") for prompt in composite.prompts)


def test_rows_of_a_composite_have_latents_of_its_parts():
    other = Concept(Lora({}), trigger="oth")
    concepts = [SUBJECT, other, STYLE]
    concepts += made(concepts)[:1]
    generator = torch.Generator().manual_seed(0)
    calibration = Calibration(contexts=0.0)
    owners = [owner for owner in range(3) for _ in range(50)]
    wording = Wording(WORDS, concepts, generator)
    request = SampleRequest(concepts, calibration, None, generator, None)
    rows = SamplePrompts(request, owners, ["p"] * 150, wording).rows(1)
    assert concepts[3].parts == (SUBJECT, STYLE)
    own = [row.latent for row in rows if row.concept == 3]
    assert len(own) == 20  # two fifths of a concept's
    assert set(own) <= {*range(50), *range(100, 150)}
    assert any(n < 50 for n in own)
    assert any(n >= 100 for n in own)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("settings", [
    {},
    pytest.param({"steps": 2}, marks=pytest.mark.slow),
    pytest.param({"schedule": "jacobi", "iterations": 2}, marks=pytest.mark.slow),
], ids=["closed form", "steps", "jacobi"])  # fmt: skip
def test_a_pipeline_takes_them_in_every_way_of_merging(host, settings):
    """The file is as thick as without them, and another one."""
    concepts = [
        Concept(random_lora(host, 1), trigger="sks", class_word="dog"),
        Concept(random_lora(host, 2), trigger="zwx style", kind="style"),
    ]
    calibration = {"samples": 2, "timesteps": 1, "denoising_steps": 2, "contexts": 0.0}
    found = [
        merge_loras(
            host, concepts, settings=settings, calibration={**calibration, "composites": weight}
        )
        for weight in (0.5, 0.0)
    ]
    ranks, (one, other) = [merged.lora.ranks for merged in found], [m.lora.sites for m in found]
    assert ranks[0] == ranks[1]
    assert one.keys() == other.keys()
    apart = [
        float((one[s].dense() - other[s].dense()).norm() / other[s].dense().norm()) for s in one
    ]
    assert all(map(math.isfinite, apart))
    assert max(apart) > 1e-3
