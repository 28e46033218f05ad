"""Merging through ComfyUI is merging through diffusers: the same weights, LoRAs, prompts, noise and
timesteps give the same change at every site. Each side makes its own latents and conditioning."""

import dataclasses

import pytest
import reduced_models
from kit import merge_on, part
from reduced_pipelines import flux_parts, flux_pipeline, sdxl_pipeline
from thin_models import load_thin, thin_pipeline

SDXL = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (64, 64),
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (64, 2048),
    "unet.mid_block.attentions.0.proj_in": (64, 64),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (64, 64),
    "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v": (64, 2048),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (768, 768),
    "text_encoder_2.encoder.layers.1.self_attn.v_proj": (1280, 1280),
}
_DOUBLE, _SINGLE = "transformer.transformer_blocks.0.", "transformer.single_transformer_blocks.0."
FLUX = {
    **{f"{_DOUBLE}attn.{name}": (64, 64) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"{_DOUBLE}attn.add_{name}_proj": (64, 64) for name in "qkv"},
    f"{_DOUBLE}ff.net.2": (64, 256),
    **{f"{_SINGLE}attn.to_{name}": (64, 64) for name in "qkv"},
    f"{_SINGLE}proj_mlp": (256, 64),
    f"{_SINGLE}proj_out": (64, 320),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (768, 768),
}


class Sides:
    """Both merges of the same files."""

    def __init__(self, pack):
        self.core, self.merging = part(pack, "iteris_core"), part(pack, "nodes.merging")
        self.thresholds = part(pack, "iteris_core.solve.choose").THRESHOLDS
        self.make_spec = part(pack, "nodes.concept_specs").make_spec
        self.host = part(pack, "iteris_core.hosts.diffusers").DiffusersHost
        self.calibration = self.core.Calibration(
            samples=4, timesteps=2, denoising_steps=4, latent_size=8
        )
        # The ridge keeps the solve from magnifying the rounding in which the two libraries differ.
        self.settings = {"precision": "float64", "ridge": 1e-4}

    def concepts(self, files):
        words = [{"trigger": "sks", "class_word": "cat"}, {"trigger": "zwx", "class_word": "dog"}]
        return [self.make_spec(f, strength=s, **w)
                for f, s, w in zip(files, (1.0, 0.7), words, strict=True)]  # fmt: skip

    def in_comfyui(self, model, clip, files):
        on = self.merging, model, clip, self.concepts(files)
        how = self.settings, self.calibration
        merged = merge_on(*on, "iteris", *how, thresholds=self.thresholds)
        return {site: change.dense().double() for site, change in merged.lora.sites.items()}

    def in_diffusers(self, pipeline, files, **call):
        host = self.host(pipeline, **call)
        merged = self.core.merge_loras(
            host,
            [
                dataclasses.replace(spec, lora=host.read_lora(spec.file))
                for spec in self.concepts(files)
            ],
            settings=self.settings,
            calibration=self.calibration,
            thresholds=self.thresholds,
        )
        return {site: change.dense().double() for site, change in merged.lora.sites.items()}


@pytest.fixture
def sides(pack):
    return Sides(pack)


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    errors = {s: float((found[s] - w).norm() / w.norm().clamp(min=1e-9)) for s, w in wanted.items()}
    # These take out drift, a small difference of two large streams that round on their own, more so
    # with every layer of the text encoder.
    drift = ("fc2", "out_proj")
    apart = {s: e for s, e in errors.items() if e >= (2e-3 if s.endswith(drift) else 1e-4)}
    assert not apart, "\n".join(f"{s} {e:.1e}" for s, e in apart.items())


def test_sd15(sides, models):
    """In all directions of the output: the principal ones of targets that hold little but drift, as
    of random LoRAs, round with it. SDXL and FLUX below have theirs."""
    sides.thresholds = dataclasses.replace(sides.thresholds, small_target=1 << 62)
    files = [models / "models" / "loras" / f"{name}.safetensors" for name in "ab"]
    found = sides.in_comfyui(*load_thin(models), files)
    assert len(found) == 62  # 28 of them repair
    assert_same(found, sides.in_diffusers(thin_pipeline(), files))


def test_sdxl(sides, tmp_path):
    model, clip = reduced_models.sdxl()
    # With fewer tokens than inputs of a layer, rounding grows by 1 / ridge.
    sides.calibration = dataclasses.replace(sides.calibration, latent_size=16)
    files = [reduced_models.write_lora(tmp_path / f"{n}.safetensors", SDXL, n) for n in (1, 2)]
    found = sides.in_comfyui(model, clip, files)
    assert_same(
        {site.replace("r_2.enc", "r_2.text_model.enc"): delta for site, delta in found.items()},
        sides.in_diffusers(sdxl_pipeline(model, clip), files),
    )


def test_flux(sides, tmp_path):
    """ComfyUI solves fused weights in one; at full rank that is the same as solving their parts.
    A bound is on the whole there, and phantoms are seeded by the names of sites."""
    sides.calibration = dataclasses.replace(sides.calibration, conditions=0.0)
    sides.settings["bound"] = 0.0
    model, clip = reduced_models.flux()
    files = [reduced_models.write_lora(tmp_path / f"{n}.safetensors", FLUX, n, rank=32)
             for n in (1, 2)]  # fmt: skip
    found = sides.in_comfyui(model, clip, files)
    parts = {f"{site}.weight": delta for site, delta in found.items()}
    named = flux_parts(model, parts, "unet.")
    found = {
        f"transformer.{name.removesuffix('.weight')}": delta for name, delta in named.items()
    } | {site: delta for site, delta in found.items() if site.startswith("text_encoder")}
    # As many tokens of T5 as ComfyUI gives.
    assert_same(
        found, sides.in_diffusers(flux_pipeline(model, clip), files, max_sequence_length=256)
    )
