"""The step `base`: UNet and text encoder from scratch, v-prediction, on shards of latents."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F

from ..evaluate import sheet
from ..pipeline import assemble, load_autoencoder, new_scheduler, new_text_encoder, new_unet
from ..tokenizer import build_tokenizer
from .common import Average, Run, bf16
from .latents import SHARDS, shard

log = logging.getLogger(__name__)
STEPS, BATCH, PEAK = 10_500, 32, 8e-4
STEPS_PER_SHARD = 150  # a new shard joins every so many steps, until all are in use
LOOK = (
    "a red star on a blue background",
    "a yellow ring on a black background",
    "a green triangle on a white background",
    "a purple cross on a pink background",
    "a cyan square on a gray background",
    "a blue circle on a yellow background",
    "a patterned star on a white background",
    "a patterned square on a gray background",
    "a red star left of a green ring on a white background",
    "a blue square left of a yellow triangle on a gray background",
    "a pink circle left of a cyan cross on a black background",
    "a patterned star left of a patterned circle on a white background",
)


def velocity(alphas: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor):
    """(noised latents, v target) at timesteps `t`; alphas: the schedule's alphas_cumprod."""
    a = alphas[t].sqrt().view(-1, 1, 1, 1)
    s = (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
    return a * latents + s * noise, a * noise - s * latents


def use_plain_attention(unet, text_encoder) -> None:
    """Compute attention with plain matrix products: on a CPU the backward pass is far faster in
    bfloat16 than with the fused kernel (a whole step took 0.26 s instead of 0.42 s)."""
    unet.set_attn_processor(AttnProcessor())
    text_encoder.set_attn_implementation("eager")


def train(work: Path, weights: Path, steps: int = STEPS) -> dict:
    """Train (or go on) and save the pipeline into `weights`/base."""
    torch.manual_seed(31)
    tokenizer = build_tokenizer(weights / "base" / "tokenizer")
    vae = load_autoencoder(weights / "base" / "vae")
    unet, text_encoder = new_unet(), new_text_encoder(tokenizer)
    use_plain_attention(unet, text_encoder)
    models = [unet, text_encoder]
    embeddings = text_encoder.get_input_embeddings().weight  # unseen tokens must not decay
    others = [p for m in models for p in m.parameters() if p is not embeddings]
    groups = [{"params": others}, {"params": [embeddings], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    run = Run(
        work / "base",
        {"unet": unet, "text": text_encoder},
        optimizer,
        Average(models, 0.998),
        steps,
        PEAK,
        31,
    )
    alphas = new_scheduler().alphas_cumprod
    latents, tokens, running = torch.empty(0), torch.empty(0), 0.0
    for step in range(run.start, steps):
        wanted = min(SHARDS, 2 + step // STEPS_PER_SHARD)
        if len(latents) != wanted * 4096:
            shards = [shard(work, i, vae, tokenizer) for i in range(wanted)]
            latents = torch.cat([s["latents"] for s in shards])
            tokens = torch.cat([s["tokens"] for s in shards])
        _, generator = run.generators(step)
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator)
        noised, target = velocity(alphas, latents[rows], noise, t)
        with bf16():
            context = text_encoder(tokens[rows].long())[0]
            predicted = unet(noised, t, context, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), target)
        run.descend(step, loss)
        running = loss.item() if step == run.start else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            log.info("base %d/%d loss %.4f  %.0f s", step, steps, running, run.elapsed)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            run.average.swap()
            pipeline = assemble(vae, unet, text_encoder, tokenizer)
            look(pipeline, work / "base" / f"look_{step + 1:05d}.png")
            export(pipeline, weights)
            run.average.swap()
            run.save(step + 1)
    return {"base_seconds": round(run.elapsed), "base_steps": steps}


def export(pipeline: StableDiffusionPipeline, weights: Path) -> None:
    """Save UNet, text encoder and the rest as float16 (the autoencoder is there already)."""
    import copy

    folder = weights / "base"
    for name in ("unet", "text_encoder"):
        half = copy.deepcopy(getattr(pipeline, name)).to(torch.float16)
        half.save_pretrained(folder / name)
    # transformers loads in the dtype that the configuration names, diffusers in float32
    path = folder / "text_encoder" / "config.json"
    path.write_text(path.read_text().replace('"float16"', '"float32"'))
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)


@torch.no_grad()
def look(pipeline: StableDiffusionPipeline, path: Path, prompts=LOOK, columns: int = 6) -> None:
    """A sheet of samples to look at: two pictures for each prompt."""
    prompts = [p for p in prompts for _ in range(2)]
    with bf16():
        images = pipeline(
            prompts,
            num_inference_steps=20,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(5),
        ).images
    sheet(images, path, columns)
