"""Inputs besides the prompts, and the latents' size without them."""

from types import SimpleNamespace
from typing import Any

import pytest
import reduced_models
import torch
from kit import merge_on, part
from reduced_models import ARCHITECTURES, unets
from reduced_models.wan import wan_i2v


class Bench:
    def __init__(self, pack, folder):
        self.core, self.merging = part(pack, "iteris_core"), part(pack, "nodes.merging")
        self.conds, self.sizes = part(pack, "nodes.comfy_conds"), part(pack, "nodes.comfy_sizes")
        self.denoiser, self.lora = (
            part(pack, "nodes.comfy_denoiser"),
            part(pack, "nodes.comfy_lora"),
        )
        self.make_spec = part(pack, "nodes.concept_specs").make_spec
        self.folder = folder

    def concepts(self, sites, count=2):
        files = [reduced_models.write_lora(self.folder / f"{n}.safetensors", sites, n)
                 for n in range(count)]  # fmt: skip
        words = ("sks", "zwx")
        return [self.make_spec(file, trigger=word, class_word="cat")
                for file, word in zip(files, words, strict=False)]  # fmt: skip

    def merge(self, on, concepts, **options):
        calibration = self.core.Calibration(
            samples=4, timesteps=2, denoising_steps=3, latent_size=8
        )
        return merge_on(self.merging, *on, concepts, "iteris", {}, calibration, **options)


@pytest.fixture
def bench(pack, tmp_path):
    return Bench(pack, tmp_path)


def beside(**entries):
    """A CONDITIONING with these entries, of which the text is not used."""
    return [[torch.full((1, 5, 7), 9.0), {"pooled_output": torch.ones(1, 3), **entries}]]


def picture(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(monkeypatch, model):
    """The arguments of all calls of the denoiser."""
    found: list[dict[str, Any]] = []
    forward = model.model.diffusion_model.forward

    def keep(x, *args, **given):
        found.append({**given, "x": x})
        return forward(x, *args, **given)

    monkeypatch.setattr(model.model.diffusion_model, "forward", keep)
    return found


FLUX = {
    "transformer.transformer_blocks.0.attn.to_q": (64, 64),
    "transformer.single_transformer_blocks.0.attn.to_v": (64, 64),
}


def test_reference_latents_go_into_every_row(bench, monkeypatch):
    """As with FLUX.1 Kontext."""
    on = reduced_models.flux()
    concepts = bench.concepts(FLUX)
    given = bench.conds.References.of(
        beside(reference_latents=[picture(1, 16, 6, 6)], reference_latents_method="offset")
    )
    calls = seen(monkeypatch, on[0])
    bench.merge(on, concepts, references=given, unmergeable="refuse")
    assert calls
    for call in calls:
        (latent,) = call["ref_latents"]
        assert latent.shape == (len(call["x"]), 16, 6, 6)
        assert call["ref_latents_method"] == "offset"
        assert call["context"].shape[-1] == 64  # the row's own text


def test_a_mask_and_what_it_hides(bench, monkeypatch):
    """An inpainting UNet: mask and masked picture beside the latents, which stay outside of the
    mask what they are, with the noise of their step."""
    on = unets.sd15_inpainting()
    mask = torch.zeros(1, 64, 96)
    mask[:, :, 48:] = 1
    latent = {"samples": picture(1, 4, 8, 12), "noise_mask": mask}
    entries = beside(concat_latent_image=picture(1, 4, 8, 12, seed=2), concat_mask=mask[:, None])
    calls = seen(monkeypatch, on[0])
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = bench.lora.ComfySites(*on).base.shapes[site][0]
    references = bench.conds.References.of(entries, latent)
    bench.merge(on, bench.concepts({site: (width, width)}), references=references)
    assert {tuple(call["x"].shape[1:]) for call in calls} == {(9, 8, 12)}
    shown = torch.cat([call["x"] for call in calls])
    assert torch.equal(shown[:, 4, :, :6].unique(), torch.zeros(1))
    assert torch.equal(shown[:, 4, :, 6:].unique(), torch.ones(1))
    wanted = on[0].model.process_latent_in(picture(1, 4, 8, 12, seed=2))[0]
    assert torch.allclose(shown[:, 5:], wanted.expand(len(shown), -1, -1, -1), atol=1e-6)


def test_first_frame_and_what_clip_sees(bench, monkeypatch):
    """Wan I2V: without a picture nothing reaches img_emb, which is refused or left out."""
    on = wan_i2v()
    sites = {
        "diffusion_model.blocks.0.cross_attn.k_img": (96, 96),
        "diffusion_model.blocks.1.self_attn.q": (96, 96),
        "diffusion_model.img_emb.proj.1": (1280, 1280),
    }
    concepts = bench.concepts(sites)
    with pytest.raises(bench.core.IterisError, match=r"img_emb.*is not used by this base"):
        bench.merge(on, concepts, unmergeable="refuse")
    skipped = bench.merge(on, concepts, unmergeable="skip")
    assert not any("img_emb" in site for site in skipped.lora.sites)
    assert "LEFT OUT" in skipped.report.summary()
    states = SimpleNamespace(penultimate_hidden_states=picture(1, 9, 1280))
    references = bench.conds.References.of(
        beside(
            clip_vision_output=states,
            concat_latent_image=picture(1, 16, 3, 8, 6),
            concat_mask=torch.ones(1, 1, 3, 8, 6),
        ),
        {"samples": torch.zeros(1, 16, 3, 8, 6)},
    )
    calls = seen(monkeypatch, on[0])
    result = bench.merge(on, concepts, references=references, unmergeable="refuse")
    assert {site.replace("diffusion_model", "unet") for site in sites} <= set(result.lora.sites)
    assert {tuple(call["x"].shape[1:]) for call in calls} == {(36, 3, 8, 6)}


def test_a_control_is_run_at_its_own_step(bench):
    """Rows of a forward are of one step: a control net asks the first row for all."""
    from comfy.controlnet import ControlBase

    asked: list[tuple[int, set[float]]] = []

    class Control(ControlBase):
        def get_control(self, x, t, *_):
            assert self.timestep_range is not None
            asked.append((len(x), set(t.tolist())))

    on = unets.sd15()
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = bench.lora.ComfySites(*on).base.shapes[site][0]
    control = Control()
    references = bench.conds.References.of(beside(control=control))
    bench.merge(on, bench.concepts({site: (width, width)}), references=references)
    assert all(len(steps) == 1 for _, steps in asked)
    assert max(rows for rows, _ in asked) > 1
    assert control.timestep_range is None  # cleaned up


def test_where_and_when_a_text_counts_stays_out(bench):
    entries = beside(guidance=2.0, area=(1, 1, 0, 0), start_percent=0.5, attention_mask=1)
    assert bench.conds.References.of(entries).entries == {"guidance": 2.0}
    text = (torch.zeros(1, 2, 3), {"pooled_output": None, "guidance": 4.0})
    states, own = bench.conds.References.of(entries).beside(text)
    assert states is text[0]
    assert own == {"pooled_output": None, "guidance": 4.0}


SIZES = {
    "FLUX.1": (1, 16, 64, 64),
    "FLUX.2": (1, 128, 32, 32),
    "Chroma Radiance": (1, 3, 512, 512),
    "HunyuanDiT": (1, 4, 64, 64),
    "Qwen-Image": (1, 16, 1, 64, 64),
    "Stable Cascade C": (1, 16, 24, 24),
    "Wan 2.1 T2V": (1, 16, 3, 64, 64),
    "LTX-Video": (1, 128, 2, 32, 32),
    "Mochi": (1, 12, 2, 64, 64),
    "Stable Audio": (1, 64, 256),
    "ACE-Step": (1, 8, 16, 256),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_size_rule(bench, name):
    model, _ = ARCHITECTURES[name].make()
    assert bench.sizes.latent_shape(model, bench.core.Calibration()) == SIZES[name]


def test_the_toybox_has_images_of_its_own_size(bench, pack):
    model, *_ = part(pack, "nodes.comfy_toybox").IterisToybox.execute("sks1").result
    assert bench.sizes.latent_shape(model, bench.core.Calibration()) == (1, 4, 8, 8)


def test_frames_and_a_latent_of_ones_own(bench):
    model, _ = reduced_models.wan()
    calibration = bench.core.Calibration(frames=17, latent_size=6)
    assert bench.sizes.latent_shape(model, calibration) == (1, 16, 5, 6, 6)
    given = bench.conds.References.of(None, {"samples": torch.zeros(2, 16, 7, 4, 8)})
    assert bench.denoiser.Denoiser(model, given).shape(calibration) == (1, 16, 7, 4, 8)
