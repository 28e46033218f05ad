"""A speed LoRA for the toybox: its base's twenty steps with guidance, in four steps without.

``python benchmarks/speed_lora_training.py`` writes ``benchmarks/distilled/four_steps.safetensors``,
in minutes on one core. Its prompts are captions of the base's own training, without any concept.

In the manner of progressive distillation (Salimans and Ho 2022) in one go: at the four timesteps of
the short schedule the student's DDIM step is to end where the teacher's five steps end,

    x_next = c_x x + c_v v,  so that  v = (x_next − c_x x) / c_v

is what it learns on the teacher's states.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from outputs import ROOT
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional

import toybox
from toybox import draw
from toybox.train.base import use_plain_attention
from toybox.train.common import bf16, one_cycle
from toybox.train.lora_files import adapter_metadata

FILE = ROOT / "benchmarks" / "distilled" / "four_steps.safetensors"
STEPS = 4
RANK, BATCH, PEAK = 8, 32, 2e-3
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


def captions(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [draw.caption(draw.random_scene(rng, patterned=0.3), rng) for _ in range(count)]


def contexts(pipeline, prompts: list[str]) -> Tensor:
    tokens = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    return pipeline.text_encoder(tokens)[0]


@torch.no_grad()
def taught(pipeline, prompts: list[str], seed: int) -> tuple[Tensor, Tensor]:
    """(prompts, STEPS + 1, latent) states of the teacher on its way, and the prompts' contexts."""
    said = toybox.settings()
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(said["steps"])
    each = said["steps"] // STEPS
    context = contexts(pipeline, prompts)
    both = torch.cat([contexts(pipeline, [""]).expand_as(context), context])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(prompts), 4, 8, 8, generator=generator)
    states = [x]
    for number, t in enumerate(scheduler.timesteps, 1):
        plain, named = pipeline.unet(torch.cat([x, x]), t, both, return_dict=False)[0].chunk(2)
        v = plain + said["guidance"] * (named - plain)
        x = scheduler.step(v, t, x, return_dict=False)[0]
        if number % each == 0:
            states.append(x)
    return torch.stack(states, 1), context


def short_schedule(pipeline) -> tuple[Tensor, Tensor, Tensor]:
    """The timesteps of the four steps, and c_x and c_v of each."""
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps
    now = scheduler.alphas_cumprod[timesteps]
    then = torch.cat([scheduler.alphas_cumprod[timesteps[1:]], scheduler.final_alpha_cumprod[None]])
    a, s, b, r = now.sqrt(), (1 - now).sqrt(), then.sqrt(), (1 - then).sqrt()
    return timesteps, b * a + r * s, r * a - b * s


def train(trajectories: int, steps: int) -> None:
    torch.manual_seed(0)
    pipeline = toybox.load_pipeline()
    use_plain_attention(pipeline.unet, pipeline.text_encoder)
    groups = range(max(trajectories // 64, 1))
    parts = [taught(pipeline, captions(64, number), number) for number in groups]
    states, context = (torch.cat(some) for some in zip(*parts, strict=True))
    timesteps, keep, move = short_schedule(pipeline)
    keep, move = keep.view(-1, 1, 1, 1), move.view(-1, 1, 1, 1)
    targets = (states[:, 1:] - keep * states[:, :-1]) / move
    unet = pipeline.unet.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    unet.add_adapter(config)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, PEAK, weight_decay=0.0)
    schedule = one_cycle(optimizer, PEAK, steps)
    generator, running = torch.Generator().manual_seed(1), 0.0
    for step in range(steps):
        rows = torch.randint(len(states), (BATCH,), generator=generator)
        stage = torch.randint(STEPS, (BATCH,), generator=generator)
        with bf16():
            v = unet(states[rows, stage], timesteps[stage], context[rows], return_dict=False)[0]
        loss = functional.mse_loss(v.float(), targets[rows, stage])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step}: loss {running:.4f}", flush=True)
    from peft.utils import get_peft_model_state_dict

    FILE.parent.mkdir(exist_ok=True)
    layers = {k: t.detach().half().contiguous() for k, t in get_peft_model_state_dict(unet).items()}
    pipeline.save_lora_weights(
        FILE.parent,
        unet_lora_layers=layers,
        unet_lora_adapter_metadata=adapter_metadata(config),
        weight_name=FILE.name,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1500)
    asked = parser.parse_args()
    train(asked.trajectories, asked.steps)
