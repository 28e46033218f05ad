"""SDXL and FLUX at reduced widths.

There is no host of diffusers for them to agree with, so the law that is tested is this: the merge
of one LoRA gives what that LoRA gives. It fails if a site is misnamed, a row is mixed up, or pooled
outputs, sizes or guidance are not what ComfyUI's sampler makes them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import reduced_models
import torch

SDXL = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (64, 64),
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (64, 2048),
    "unet.mid_block.attentions.0.proj_in": (64, 64),
    "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0": (64, 64),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (768, 768),
    "text_encoder_2.encoder.layers.0.self_attn.v_proj": (1280, 1280),
}
FLUX = {
    "transformer.transformer_blocks.0.attn.to_q": (64, 64),
    "transformer.transformer_blocks.0.attn.to_k": (64, 64),
    "transformer.transformer_blocks.0.attn.add_v_proj": (64, 64),
    "transformer.transformer_blocks.0.ff.net.2": (64, 256),
    "transformer.single_transformer_blocks.0.attn.to_v": (64, 64),
    "transformer.single_transformer_blocks.0.proj_out": (64, 320),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (768, 768),
}


ZIMAGE = {
    "diffusion_model.layers.0.attention.qkv": (768, 256),
    "diffusion_model.layers.1.attention.out": (256, 256),
    "diffusion_model.context_refiner.0.attention.out": (256, 256),
    "diffusion_model.cap_embedder.1": (256, 64),
}
QWEN = {
    "diffusion_model.transformer_blocks.0.attn.to_q": (96, 96),
    "diffusion_model.transformer_blocks.0.attn.add_k_proj": (96, 96),
    "diffusion_model.transformer_blocks.1.img_mlp.net.2": (96, 384),
    "diffusion_model.txt_in": (96, 64),
}


@pytest.mark.parametrize(
    ("kind", "sites"), [("sdxl", SDXL), ("flux", FLUX), ("zimage", ZIMAGE), ("qwen", QWEN)]
)
def test_merge_of_one_is_that_one(
    pack: ModuleType, tmp_path: Path, kind: str, sites: dict[str, tuple[int, int]]
) -> None:
    merging: Any = importlib.import_module(f"{pack.__name__}.nodes.merging")
    comfy_lora: Any = importlib.import_module(f"{pack.__name__}.nodes.comfy_lora")
    specs: Any = importlib.import_module(f"{pack.__name__}.nodes.concept_specs")
    core: Any = importlib.import_module(f"{pack.__name__}.iteris_core")
    model, clip = getattr(reduced_models, kind)()
    files = [reduced_models.write_lora(tmp_path / f"{n}.safetensors", sites, n) for n in (1, 2)]
    calibration = core.Calibration(samples=6, timesteps=2, denoising_steps=3, latent_size=8)
    concepts = [specs.make_spec(file, trigger="sks", class_word="cat") for file in files]

    def merge(some: Any, rows: int = 32) -> Any:
        result = merging.merge_on(model, clip, some, "iteris", {}, calibration, rows=rows)
        return result, merging.as_lora_model(result, some, "float32")

    result, tensors = merge(concepts[:1])
    (_, after), *_ = result.report.residuals()
    assert after < 1e-2
    with torch.inference_mode():
        found = draw(*comfy_lora.apply_lora(model, clip, tensors))
        wanted = draw(*stock(comfy_lora, model, clip, files[0]))
        plain = draw(model, clip)
    assert float((found - wanted).norm()) < 0.05 * float((plain - wanted).norm())

    both, small = merge(concepts)[0].lora, merge(concepts, rows=5)[0].lora
    for site, change in both.sites.items():
        gap = small.sites[site].dense() - change.dense()
        assert float(gap.norm()) < 1e-2 * float(change.dense().norm())
    assert not any(m._forward_hooks for m in model.model.modules())


@pytest.mark.parametrize("kind", ["zimage", "qwen"])
def test_texts_of_several_lengths_are_what_a_sampler_gives(pack: ModuleType, kind: str) -> None:
    """No padding: conditionings are ComfyUI's own, and their inputs batch within a length only."""
    text: Any = importlib.import_module(f"{pack.__name__}.nodes.comfy_text")
    denoiser: Any = importlib.import_module(f"{pack.__name__}.nodes.comfy_denoiser")
    conds: Any = importlib.import_module(f"{pack.__name__}.nodes.comfy_conds")
    model, clip = getattr(reduced_models, kind)()
    encoders = text.TextEncoders(clip)
    prompts = ["", "a cat", "a dog", "a large cat on the beach"]
    tokens = encoders.tokenize(prompts)
    encoders.load()
    batches = encoders.batches([0] * 4, tokens, {}, set())
    for batch in batches.values():
        batch.run_all(2)
    found = encoders.assemble([0] * 4, tokens, batches, 0, None)
    with torch.inference_mode():
        for prompt, (cond, extra) in zip(prompts, found, strict=True):
            ((wanted, more),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
            assert torch.allclose(cond, wanted, atol=1e-5)
            assert set(extra) == set(more)
    inputs = [denoiser.Denoiser(model).inputs(some, (1, 16, 1, 8, 8)) for some in found]
    kinds = [conds.kind(some) for some in inputs]
    assert kinds[1] == kinds[2]
    assert len(set(kinds)) == 3


def stock(comfy_lora: Any, model: Any, clip: Any, file: Path) -> tuple[Any, Any]:
    """The LoRA as ComfyUI applies it, under the names that our reader adds."""
    import comfy.lora
    import comfy.utils

    key_map = comfy_lora.ComfySites(model, clip).key_map
    loaded = comfy.lora.load_lora(comfy.utils.load_torch_file(str(file)), key_map)
    model, clip = model.clone(), clip.clone()
    model.add_patches(loaded)
    clip.add_patches(loaded)
    return model, clip


def draw(model: Any, clip: Any) -> torch.Tensor:
    import comfy.sample
    import comfy.samplers

    text = clip.encode_from_tokens_scheduled(clip.tokenize("a photo of a sks cat"))
    empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 4, 8, 8))
    noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(3))
    sampler = comfy.samplers.KSampler(
        model, 3, model.load_device, "euler", "simple", model_options=model.model_options
    )
    return sampler.sample(noise, text, text, cfg=1.0, latent_image=empty, disable_pbar=True).clone()
