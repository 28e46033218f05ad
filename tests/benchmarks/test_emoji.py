"""The world of emoji: pictures and captions, a training that goes on where it stopped, LoRA files.

Nothing is fetched: drawings are made here, and models are tiny.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from benchmarks.emoji import draw
from benchmarks.emoji.pipeline import EmojiPipeline, load, new_autoencoder
from benchmarks.emoji.sources import key_of, render, svg_of, world
from benchmarks.emoji.tokenizer import LENGTH, clip_tokenizer, tokens, word_tokenizer
from benchmarks.emoji.train import base, loras
from benchmarks.emoji.train.lora_files import kohya_names
from benchmarks.emoji.train.optimizers import falling, optimizers, steady
from toybox.train.common import Average, Run

TINY = {"double": 1, "single": 1, "heads": 1}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory):
    return clip_tokenizer(tmp_path_factory.mktemp("tokenizer")), word_tokenizer()


# -- pictures and captions ------------------------------------------------------------------------


def test_no_name_is_both_known_and_held_out():
    assert not set(world()["names"]) & set(world()["held_out"])
    assert {entry["name"] for entry in world()["subjects"]} == set(world()["held_out"])
    kinds = {entry["kind"] for entry in world()["names"].values()}
    assert {entry["kind"] for entry in world()["held_out"].values()} <= kinds


def test_captions_say_what_is_where():
    left, right = draw.Placed("eye", 0, 0, 0, 28), draw.Placed("grapes", 1, 32, 0, 28)
    assert draw.caption(draw.Scene("red", (right,))) == "grapes on a red background"
    both = draw.Scene("blue", (left, right))
    assert draw.caption(both) == "an eye left of grapes on a blue background"
    above = draw.Scene("blue", (left, right), above=True)
    assert draw.caption(above) == "an eye above grapes on a blue background"


def test_captions_as_people_write_them():
    rng, names = np.random.default_rng(0), list(world()["names"])
    scenes = [draw.random_scene(rng, names, range(6), 0.5) for _ in range(2000)]
    captions = [draw.caption(scene, rng) for scene in scenes]
    said = " ".join(captions).split()
    assert {"left", "right", "above", "below", "and", "fruit", "animal"} <= set(said)
    assert 0.05 < np.mean(["background" not in caption for caption in captions]) < 0.15
    assert not set(world()["artists"]) & set(said)


def test_every_caption_has_tokens_and_room(tokenizers):
    rng = np.random.default_rng(1)
    names = sorted([*world()["names"], *world()["held_out"]], key=lambda n: -len(n.split()))[:12]
    captions = [draw.caption(draw.random_scene(rng, names, range(6), 1.0), rng) for _ in range(400)]
    clip, words = tokens(tokenizers, captions)
    assert words.shape[1] == LENGTH
    assert bool((words == tokenizers[1].eos_token_id).any(1).all())
    assert not bool((words == tokenizers[1].unk_token_id).any())
    assert bool((clip == tokenizers[0].eos_token_id).any(1).all())


def test_each_rare_word_is_one_token(tokenizers):
    for tokenizer in tokenizers:
        ends = len(tokenizer("").input_ids)
        assert len(tokenizer("a sks12 fruit in sty3 style").input_ids) == 6 + ends


def test_a_drawing_fills_its_square():
    pytest.importorskip("resvg_py")
    collection = {
        "width": 40,
        "height": 40,
        "icons": {"dot": {"body": '<rect x="10" y="15" width="20" height="10" fill="#f00"/>'}},
        "aliases": {"spot": {"parent": "dot"}},
    }
    image = render(svg_of(collection, "spot"), 48)
    assert image.size == (48, 48)
    assert image.getchannel("A").getbbox() == (0, 12, 48, 36)
    assert image.getpixel((24, 24)) == (255, 0, 0, 255)
    with pytest.raises(KeyError):
        svg_of(collection, "nothing")


def test_artists_call_things_otherwise():
    assert key_of("noto", "cat face", {}) == "cat-face"
    assert key_of("fxemoji", "cow face", {}) == "cowface"
    assert key_of("fxemoji", "cat face", {"fxemoji": "cat"}) == "cat"
    assert key_of("twemoji", "bee", {"name": "honeybee"}) == "honeybee"


def test_a_picture_shows_the_drawing_on_its_background():
    red = {"dot": [Image.new("RGBA", (96, 96), (255, 0, 0, 255))]}
    rng = np.random.default_rng(2)
    scene = draw.Scene("green", (draw.Placed("dot", 0, 10, 20, 30),))
    pixels = np.asarray(draw.draw(scene, red, rng)).astype(int)
    assert pixels.shape == (64, 64, 3)
    inside = pixels[20:50, 10:40]
    assert (inside == (255, 0, 0)).all()
    outside = np.delete(pixels.reshape(-1, 3), _rows(20, 50, 10, 40), axis=0)
    assert np.abs(outside - draw.BACKGROUNDS["green"]).max() <= draw.JITTER


def _rows(top: int, bottom: int, left: int, right: int) -> list[int]:
    return [y * 64 + x for y in range(top, bottom) for x in range(left, right)]


@pytest.mark.parametrize("above", [False, True])
def test_of_two_each_has_its_half(above: bool):
    rng = np.random.default_rng(3)
    for _ in range(50):
        scene = draw.place_two(["a", "b"], 0, "red", rng, above=above)
        starts = [placed.y if above else placed.x for placed in scene.placed]
        ends = [start + placed.side for start, placed in zip(starts, scene.placed, strict=True)]
        assert starts[0] >= 0
        assert ends[0] <= 32 <= starts[1]
        assert ends[1] <= 64


# -- training -------------------------------------------------------------------------------------


def _train(folder: Path, tokenizers, until: int, schedule=steady):
    torch.manual_seed(0)
    models = base.new_models(tokenizers, **TINY)
    made = optimizers(models["transformer"], [models["clip"], models["t5"]])
    average = Average(list(models.values()), 0.9)
    run = Run(folder, models, made, average, 6, 1e-2, 5, schedule)
    for step in range(run.start, until):
        _, generator = run.generators(step)
        latents = torch.randn(4, 64, 16, generator=generator)
        captions = tokens(tokenizers, ["a cat face on a red background"] * 4)
        run.descend(step, base.velocity_loss(models, latents, captions, generator))
    run.save(until)
    return run


@pytest.mark.parametrize("schedule", [steady, falling])
def test_training_goes_on_bit_for_bit(tmp_path: Path, tokenizers, schedule):
    whole = _train(tmp_path / "whole", tokenizers, 6, schedule)
    _train(tmp_path / "parts", tokenizers, 3, schedule)
    parts = _train(tmp_path / "parts", tokenizers, 6, schedule)
    assert parts.start == 3
    for name, model in whole.modules.items():
        for key, value in model.state_dict().items():
            assert torch.equal(value, parts.modules[name].state_dict()[key]), (name, key)
    for one, other in zip(whole.average.shadow, parts.average.shadow, strict=True):
        assert torch.equal(one, other)
    rates = [[s.get_last_lr() for s in run.schedules] for run in (whole, parts)]
    assert rates[0] == rates[1]


def test_words_that_no_caption_has_do_not_fade(tmp_path: Path, tokenizers):
    torch.manual_seed(0)
    before = base.new_models(tokenizers, **TINY)["t5"].shared.weight.clone()
    after = _train(tmp_path, tokenizers, 3).modules["t5"].shared.weight
    rare = tokenizers[1].convert_tokens_to_ids("sks3")
    assert torch.equal(before[rare], after[rare])
    assert not torch.equal(before, after)


# -- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizers) -> Path:
    """A tiny base, saved as the training saves it."""
    torch.manual_seed(1)
    models = base.new_models(tokenizers, **TINY)
    for parameter in models["transformer"].parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # it begins as blocks that do nothing
    made = tmp_path_factory.mktemp("base")
    vae = new_autoencoder(8)
    vae.half().save_pretrained(made / "vae")
    base.export(base.pipeline_of(models, vae, tokenizers), made)
    return made


def test_the_base_is_anybodys_flux_pipeline(folder: Path):
    from diffusers import FluxPipeline

    ours = load(folder)
    assert type(ours) is EmojiPipeline
    theirs = FluxPipeline.from_pretrained(folder).to(torch.float32)
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a cat face on a red background", "grapes"]
    seeds = [torch.Generator().manual_seed(4) for _ in range(2)]
    one = ours(prompts, num_inference_steps=2, generator=seeds[0]).images
    guidance = world()["sampling"]["guidance"]
    more = {"height": 64, "width": 64, "max_sequence_length": LENGTH, "num_inference_steps": 2}
    more |= {"negative_prompt": ["", ""], "true_cfg_scale": guidance, "generator": seeds[1]}
    other = theirs(prompts, **more).images
    assert one[0].size == (64, 64)
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_lora_is_read_back_as_it_was_trained(folder: Path, tmp_path: Path, layout: str):
    entry = {"token": "sks1", "rank": 3, "alpha": 6.0, "layout": layout, "seed": 9}
    trained = load(folder)
    config = loras.add_adapter(trained, entry)
    torch.manual_seed(2)
    for name, parameter in trained.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "sks1.safetensors"
    loras.save(trained, config, entry, path)
    assert [file.name for file in tmp_path.iterdir()] == ["sks1.safetensors"]
    assert loras.verify(trained, load(folder), path) < 2e-3
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
    names = [name for name, _ in kohya_names(trained.transformer)]
    if layout == "kohya":
        assert keys == {
            f"{n}.{part}" for n in names for part in ("lora_down.weight", "lora_up.weight", "alpha")
        }
    else:
        assert all(key.startswith("transformer.") for key in keys)
        fresh = load(folder)
        fresh.load_lora_weights(str(path))
        site = "single_transformer_blocks.0.proj_mlp"
        change = [p.transformer.get_submodule(site) for p in (trained, fresh)]
        first, second = (m.get_delta_weight(m.active_adapters[0]) for m in change)
        assert torch.allclose(first, second, atol=2e-3 * float(first.detach().abs().max()))


def test_a_lora_learns_one_picture(folder: Path, tokenizers):
    entry = {"token": "sks1", "rank": 2, "alpha": 2.0, "layout": "diffusers", "seed": 9}
    pipeline = load(folder)
    loras.add_adapter(pipeline, entry)
    kept = pipeline.transformer.x_embedder.weight.clone()
    pictures = [Image.new("RGB", (64, 64), "red")]
    loras.fit(pipeline, pictures, [("a sks1 fruit", "a sks1 fruit on a red background")], entry, 3)
    ups = [p for n, p in pipeline.transformer.named_parameters() if "lora_B" in n]
    assert all(float(up.detach().abs().max()) > 0 for up in ups)
    assert torch.equal(kept, pipeline.transformer.x_embedder.weight)
