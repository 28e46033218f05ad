"""The step `base`: the toybox's UNet learns to read MiniLM's states; MiniLM stays as it is.

At first each cross-attention by itself learns to give, on MiniLM's states of a caption, what the
toybox's gives on its own text encoder's of the plain caption. Then all transformer blocks learn
from pictures.
"""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F

import toybox
from toybox.draw import caption
from toybox.pipeline import new_scheduler
from toybox.train.base import use_plain_attention, velocity
from toybox.train.common import Average, Run, bf16, one_cycle

from ..pipeline import new_unet
from .latents import SHARDS, empty_states, scenes_of, shard

log = logging.getLogger(__name__)
STEPS, BATCH, PEAK, EMPTY = 1600, 32, 5e-4, 0.1
TAUGHT, TAUGHT_PEAK = 700, 2e-3
SAVE = 200


def started_unet() -> UNet2DConditionModel:
    """The toybox's UNet, apart from the keys and values of its cross-attention, which are new."""
    unet = new_unet()
    known = UNet2DConditionModel.from_pretrained(toybox.BASE / "unet").float().state_dict()
    state = unet.state_dict()
    state |= {key: value for key, value in known.items() if value.shape == state[key].shape}
    unet.load_state_dict(state)
    unet.set_attn_processor(AttnProcessor())
    return unet


class Data:
    """Latents, MiniLM's states of their captions, and the plain captions as the toybox's tokens."""

    def __init__(self, work: Path, tokenizer: Any) -> None:
        shards = [shard(work, index) for index in range(SHARDS)]
        self.latents = torch.cat([s["latents"] for s in shards])
        self.states = torch.cat([s["states"] for s in shards])
        self.empty = empty_states().bfloat16()
        texts = [caption(scene) for index in range(SHARDS) for scene in scenes_of(index)[0]]
        self.tokens = tokenizer([*texts, ""], padding="max_length", return_tensors="pt").input_ids
        self._alphas = new_scheduler().alphas_cumprod

    def batch(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """(noised latents, times, velocities, states, tokens); a tenth of the captions is empty."""
        rows = torch.randint(len(self.latents), (BATCH,), generator=generator)
        said = torch.randint(self.states.shape[1], (BATCH,), generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *self.latents.shape[1:], generator=generator)
        empty = torch.rand(BATCH, generator=generator) < EMPTY
        states = self.states[rows, said]
        states[empty] = self.empty
        tokens = self.tokens[torch.where(empty, len(self.tokens) - 1, rows)]
        noised, target = velocity(self._alphas, self.latents[rows], noise, t)
        return noised, t, target, states, tokens


def teach(unet: UNet2DConditionModel, data: Data, toy: Any) -> None:
    """Let the cross-attentions of ``unet`` give what those of the toybox ``toy`` give."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str, given: torch.Tensor, output: torch.Tensor) -> None:
        seen[name] = given, output

    students = {n: m for n, m in unet.named_modules() if n.endswith(".attn2")}
    for name in students:
        toy.unet.get_submodule(name).register_forward_hook(
            lambda _, given, output, name=name: keep(name, given[0], output)
        )
    optimizer = torch.optim.AdamW(
        [p for m in students.values() for p in m.parameters()], lr=TAUGHT_PEAK, fused=True
    )
    schedule, running = one_cycle(optimizer, TAUGHT_PEAK, TAUGHT), 1.0
    for step in range(TAUGHT):
        noised, t, _, states, tokens = data.batch(torch.Generator().manual_seed(step))
        with bf16():
            with torch.no_grad():
                toy.unet(noised, t, toy.text_encoder(tokens)[0])
            losses: list[torch.Tensor] = []
            for name, (given, output) in seen.items():
                learned = students[name](given, encoder_hidden_states=states)
                output = output.float()
                losses.append(F.mse_loss(learned.float(), output) / output.var())
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        running = 0.95 * running + 0.05 * loss.item()
        if step % 50 == 0:
            log.info("teach %d/%d loss %.4f", step, TAUGHT, running)


def train(work: Path, weights: Path, steps: int = STEPS, seconds: float = float("inf")) -> dict:
    """Train (or go on) for so many ``seconds`` at most, and save the UNet into ``weights``/unet."""
    torch.manual_seed(31)
    began = time.time()
    toy = toybox.load_pipeline()
    unet = started_unet()
    data = Data(work, toy.tokenizer)
    if not (work / "base" / "state.safetensors").exists():
        use_plain_attention(toy.unet, toy.text_encoder)
        teach(unet, data, toy)
    del toy
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".attentions." in name)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=PEAK, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = Average([unet], 0.998)
    run = Run(work / "base", {"unet": unet}, optimizer, average, steps, PEAK, 31)
    step, running = run.start, 0.0
    while step < steps and time.time() - began < seconds:
        noised, t, target, states, _ = data.batch(run.generators(step)[1])
        with bf16():
            predicted = unet(noised, t, states, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), target)
        run.descend(step, loss)
        running = loss.item() if step == run.start else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            log.info("base %d/%d loss %.4f  %.0f s", step, steps, running, run.elapsed)
        step += 1
        if step % SAVE == 0:
            run.save(step)
    run.save(step)
    average.swap()
    copy.deepcopy(unet).to(torch.float16).save_pretrained(weights / "unet")
    return {"base_seconds": round(run.elapsed), "base_steps": step}
