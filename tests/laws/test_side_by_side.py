"""Images of two concepts: which pairs are drawn, and the blocks' targets on them."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pipelines import PIPELINES, applied, two_concepts
from tiny import random_lora

from iteris_core import Calibration, Concept, Lora, SettingsError
from iteris_core.activations.micro_batch import MicroBatch
from iteris_core.calibration_prompts import concept_prompts, pair_prompts
from iteris_core.concepts import PAIR_TEMPLATES, TEMPLATES
from iteris_core.methods.segments import Segment, SegmentRunner
from iteris_core.methods.side_by_side import SideBySide, compose_halves, drawn_pairs, pairs_of
from iteris_core.passes.changes import changes_of
from iteris_core.passes.job import Job

CALIBRATION = Calibration(samples=4, timesteps=2, denoising_steps=3)


@pytest.mark.parametrize(
    ("shape", "picture"),
    [((2, 3, 4, 6), None), ((2, 3, 2, 4, 6), None), ((2, 24, 5), (4, 6)), ((2, 12, 5), (2, 4, 6))],
)
def test_halves_are_the_left_one_of_the_first_and_the_right_one_of_the_other(shape, picture):
    left, right = torch.zeros(shape), torch.ones(shape)
    found = compose_halves(left, right, picture, (1, 2))
    if len(shape) == 3:  # tokens, in reading order: 4 rows of 6, or 2 pictures of 2 rows of 3
        columns = 6 if shape[1] == 24 else 3
        found = found.mT.reshape(2, 5, -1, columns)
        half = 3 if columns == 6 else 2
    else:
        half = 3
    assert not found[..., :half].any()
    assert found[..., half:].all()


@pytest.mark.parametrize(
    ("shape", "picture"),
    [((2, 24, 5), None), ((2, 23, 5), (4, 6)), ((2, 6, 5), (4, 6)), ((2, 5), (4, 6))],
)
def test_what_has_no_places_has_no_halves(shape, picture):
    assert compose_halves(torch.zeros(shape), torch.ones(shape), picture, (1,)) is None


def test_prompts_name_both_and_the_left_one_first():
    dog, two = Concept(None, trigger="sks", class_word="dog"), Concept(None, subjects=["a1", "b1"])
    own = Calibration(templates=["a {}", "a {} left of a {} at night"])
    assert pair_prompts(dog, two, own) == [
        "a sks dog left of a a1 at night",
        "a sks dog left of a b1 at night",
    ]
    assert set(concept_prompts(dog, own, torch.Generator())) == {"a sks dog"}
    usual = Calibration()
    assert len(pair_prompts(two, dog, usual)) == 2 * len(PAIR_TEMPLATES)
    assert usual.single_templates == list(TEMPLATES)
    for templates in (["a {} and a {}"], ["a {}", "{} {} {}"]):
        with pytest.raises(SettingsError, match="templates must hold"):
            Calibration(templates=templates)


def job_of(host, concepts) -> Job:
    changes = changes_of(concepts)
    generator = torch.Generator().manual_seed(0)
    return Job(host, concepts, changes, CALIBRATION, generator, lambda *_: None)


def named(host, count: int = 2) -> list[Concept]:
    return [Concept(random_lora(host, s), None, f"t{s}", "dog") for s in range(1, count + 1)]


def test_every_concept_is_shown_as_often_with_another_one_each_time(host):
    concepts = named(host, 4)
    job = job_of(host, concepts)
    found = pairs_of(job, rows=16)
    assert found == [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3), (2, 0), (3, 1)]
    assert len(set(pairs_of(job, rows=1000))) == 12
    assert len(pairs_of(job, rows=1)) == 4


def test_styles_and_what_no_words_call_for_are_not_shown(host):
    first, second, third, fourth = named(host, 4)
    learned = Lora(third.lora.sites, "learned", embeddings={"t3": {"clip_l": torch.ones(1, 4)}})
    job = job_of(
        host,
        [
            first,
            Concept(second.lora, None, "t2", "look", kind="style"),
            Concept(learned, None, "t3", "dog"),
            Concept(fourth.lora, ["a t4 dog"]),
            Concept.preserve(["a dog"]),
        ],
    )
    assert pairs_of(job, rows=100) == []
    assert drawn_pairs(job, {}, 100) is None
    assert pairs_of(job_of(SimpleNamespace(pictures=False), named(host)), rows=100) == []


def first_row(run, name) -> MicroBatch:
    """The first row of a stage, in two copies."""
    for stage in run.stages():
        if stage.name == name:
            return MicroBatch(partial(stage.run, [0], 2), [0], 2)
        for row in range(len(stage.concept_ids)):
            stage.run([row], 2)
    raise AssertionError(name)


def test_a_block_is_to_give_each_half_as_its_own_lora_gives_it(host):
    """Against forwards with the LoRAs added to the weights."""
    concepts = named(host)
    job = job_of(host, concepts)
    merged = {site: some.by_concept[0] for site, some in job.changes.items()}
    module = host.pipeline.unet.mid_block
    sites = [site for site in merged if site.startswith("unet.mid_block")]
    segment = Segment(module, sites)
    drawn = drawn_pairs(job, merged, rows=8)
    assert drawn.pairs == [(0, 1), (1, 0)]
    with job.run() as run:
        run.lockstep.merged = merged
        shown = SideBySide(job, run.lockstep, drawn)
        assert shown.advance("unet")
        runner = SegmentRunner(segment, run.lockstep, first_row(run, "unet"))
        passages = list(shown.recorded(runner, 3, lambda: None))
    assert sum(len(passage.rows) for passage in passages) == 8
    seen = []
    handle = module.register_forward_hook(lambda *given: seen.append(given[-1].detach()))
    assert any(len(set(passage.owners)) == 2 for passage in passages)  # pairs share a forward
    for passage in passages:
        given = []
        for concept in (0, 1):
            with applied(host.pipeline, concepts[concept].lora), torch.no_grad():
                host.forward(drawn.samples, passage.rows)
            given.append(seen[-1])
        half = given[0].shape[-1] // 2 + given[0].shape[-1] % 2
        for row, (left, right) in enumerate(passage.owners):
            wanted = torch.cat([given[left][row, ..., :half], given[right][row, ..., half:]], -1)
            assert torch.allclose(passage.wanted[0][row], wanted, atol=1e-4)
        assert torch.allclose(passage.found[0], given[0], atol=1e-4)
    handle.remove()


@pytest.mark.parametrize(
    ("name", "picture", "patches"), [("FLUX.1", 4, [1]), ("SD 3", 8, [1]), ("Z-Image", 8, [2])]
)
def test_a_stage_knows_how_much_of_a_picture_a_token_covers(name, picture, patches, tmp_path):
    host, concepts = two_concepts(PIPELINES[name](), tmp_path)
    with job_of(host, concepts).run() as run:
        samples = run.samples
        stages = list(host.stages(samples, set(changes_of(concepts))))
    assert list(stages[-1].picture)[-1] == picture
    assert list(stages[-1].patches) == patches
