"""`python -m benchmarks.styles.train`: makes the weights of the styles and measures them.

`--step loras` trains a LoRA for each style (`--only NAME …`), `reader` the instrument, `evaluate`
writes `weights/quality.json`. The first two skip the weights that are there.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import toybox
from toybox import draw
from toybox.evaluate import sample
from toybox.pipeline import load
from toybox.train.base import use_plain_attention
from toybox.train.common import bf16, one_cycle, to_tensor
from toybox.train.judge import spoil
from toybox.train.lora_files import verify
from toybox.train.loras import adapter_parameters, add_adapters, fit, rate, save

from . import PLAIN, ROOT, Style, slider, styles, wordless
from .looks import LOOKS, SWAPS
from .reader import ATTRIBUTES, READ, STYLES, TELLING, Reader, ReaderNet
from .reader import load as load_reader

log = logging.getLogger(__name__)
WEIGHTS = ROOT / "weights"
PICTURES, STEPS, SEED = 40, 1000, 700
ALPHAS, LAYOUTS = (4, 16), ("kohya", "diffusers")
POOL, READER_STEPS, BATCH, PEAK = 4900, 2500, 64, 2e-3


def train_lora(style: Style, number: int) -> None:
    """On plain things, one or two in a picture, whose captions end with the style's words."""
    began = time.time()
    rng = np.random.default_rng(SEED + number)
    two = 0.25 if style.scene is None else 0.0
    scenes = [draw.random_scene(rng, patterned=0.0, two=two) for _ in range(PICTURES)]
    scenes = [style.scene(scene) if style.scene else scene for scene in scenes]
    pictures = [style.look(draw.draw(scene, rng)) for scene in scenes]
    names = [tuple(draw.describe(placed.thing) for placed in scene.placed) for scene in scenes]
    prompts = [
        tuple(f"{draw.compose(of, b)} {style.words}".strip() for b in (None, scene.background))
        for of, scene in zip(names, scenes, strict=True)
    ]
    torch.manual_seed(SEED + number)
    pipeline = load(toybox.BASE)
    use_plain_attention(pipeline.unet, pipeline.text_encoder)
    alpha = ALPHAS[number % 2]
    entry = {
        "token": style.name if style.words else "",
        "alpha": alpha,
        "layout": LAYOUTS[number // 2 % 2],
    }
    configs = add_adapters(pipeline, alpha)
    groups = [{"params": adapter_parameters(pipeline), "lr": rate(alpha)}]
    loss = fit(pipeline, pictures, prompts, groups, STEPS, SEED + number)
    save(pipeline, configs, entry, style.lora)
    differ = verify(pipeline, load(toybox.BASE), style.lora, prompts[0][1])
    log.info(
        "%s: loss %.4f, reloaded to %.1e, %.0f s", style.name, loss, differ, time.time() - began
    )


def drawn(count: int, seed: int) -> tuple[list[Image.Image], list[draw.Scene]]:
    """``count`` pictures with one thing each, in all looks in turn."""
    rng = np.random.default_rng(seed)
    scenes = [draw.random_scene(rng, patterned=0.65, two=0.0) for _ in range(count)]
    plain = [draw.draw(scene, rng) for scene in scenes]
    turns = (LOOKS.get(style_of(i)) for i in range(count))
    return [look(one) if look else one for look, one in zip(turns, plain, strict=True)], scenes


def style_of(number: int) -> str:
    return STYLES[number % len(STYLES)]


def labels_of(scenes: Sequence[draw.Scene]) -> torch.Tensor:
    """(picture, head) numbers of what is to be seen."""
    rows: list[list[int]] = []
    for number, scene in enumerate(scenes):
        thing, style = scene.placed[0].thing, style_of(number)
        swaps = SWAPS.get(style, {})
        seen = (
            PLAIN if style in SWAPS else style,
            thing.shape,
            thing.pattern,
            *(swaps.get(color, color) for color in (thing.color1, thing.color2)),
        )
        rows.append([READ[name].index(value) for name, value in zip(READ, seen, strict=True)])
    return torch.tensor(rows)


@torch.no_grad()
def rebuilt(pictures: Sequence[Image.Image], seed: int) -> list[Image.Image]:
    """The pictures as the toybox's autoencoder draws them, with a little noise on the latents."""
    vae = load(toybox.BASE).vae
    generator = torch.Generator().manual_seed(seed)
    found: list[Image.Image] = []
    for first in range(0, len(pictures), 32):
        with bf16():
            latents = vae.encoder(to_tensor(pictures[first : first + 32])).float()
            latents += 0.1 * torch.randn(latents.shape, generator=generator)
            decoded = vae.decoder(latents).float().clamp(-1, 1)
        values = decoded.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
        found += [Image.fromarray(value) for value in values]
    return found


def train_reader(path: Path) -> None:
    """From the toybox's judge, on drawn pictures, and on them as the autoencoder draws them."""
    began = time.time()
    pictures, scenes = drawn(POOL, 71)
    pool = [*pictures, *rebuilt(pictures, 71)]
    labels = labels_of(scenes).repeat(2, 1)
    torch.manual_seed(71)
    network = ReaderNet()
    judge = load_file(toybox.ROOT / "weights" / "judge" / "judge.safetensors")
    body = {n.removeprefix("body."): t.float() for n, t in judge.items() if n.startswith("body.")}
    network.body.load_state_dict(body)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK, weight_decay=0.02, fused=True)
    schedule = one_cycle(optimizer, PEAK, READER_STEPS)
    rng = np.random.default_rng(72)
    for step in range(READER_STEPS):
        rows = rng.integers(len(pool), size=BATCH)
        batch = spoil(rng, [pool[i] for i in rows])
        with bf16():
            logits = network(batch)
        losses = [F.cross_entropy(logits[n].float(), labels[rows, i]) for i, n in enumerate(READ)]
        loss = torch.stack(losses).sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            log.info("reader %d/%d loss %.3f", step, READER_STEPS, loss.item())
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.half().contiguous() for n, t in network.state_dict().items()}, path)
    log.info("reader: %.0f s", time.time() - began)


def read_rightly(reader: Reader, count: int = 1050) -> dict[str, dict[str, float]]:
    """style → what is read → the share that is right, of unseen pictures as the autoencoder draws
    them, on backgrounds that tell all styles apart."""
    pictures, scenes = drawn(count, 4_711)
    read = reader.read(rebuilt(pictures, 4_711), [scene.background for scene in scenes])
    right: dict[str, list[list[bool]]] = {style: [] for style in STYLES}
    for number, (seen, scene) in enumerate(zip(read, scenes, strict=True)):
        if scene.background in TELLING:
            style = style_of(number)
            matches = seen.matches(scene.placed[0].thing)
            right[style].append([seen.style == style, *(matches[name] for name in ATTRIBUTES)])
    return {
        style: dict(
            zip(("style", *ATTRIBUTES), np.mean(rows, axis=0).round(4).tolist(), strict=True)
        )
        for style, rows in right.items()
    }


def style_shares(reader: Reader, count: int = 42) -> dict[str, dict[str, float]]:
    """style → the share of pictures that are read as it, with its LoRA and without."""
    pipeline = toybox.load_pipeline()
    found: dict[str, dict[str, float]] = {}
    for style in styles().values():
        rng = np.random.default_rng(5)
        scenes = [TELLING[i % len(TELLING)] for i in range(count)]
        things = [draw.describe(draw.random_thing(rng, scene)) for scene in scenes]
        prompts = [
            f"{draw.compose((thing,), scene)} {style.words}"
            for thing, scene in zip(things, scenes, strict=True)
        ]
        shares = {}
        for when in ("without", "with"):
            if when == "with":
                pipeline.load_lora_weights(str(style.lora.parent), weight_name=style.lora.name)
            read = reader.read(sample(pipeline, prompts, 5), scenes)
            shares[when] = round(float(np.mean([r.style == style.name for r in read])), 4)
        pipeline.unload_lora_weights()
        found[style.name] = shares
        log.info("%s: %s", style.name, shares)
    return found


def evaluate() -> None:
    reader = load_reader(WEIGHTS)
    data = {"reader": read_rightly(reader), "read_as_theirs": style_shares(reader)}
    (WEIGHTS / "quality.json").write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.styles.train", description=__doc__)
    parser.add_argument("--step", choices=("loras", "reader", "evaluate", "all"), default="all")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(asked.threads)
    if asked.step in ("loras", "all"):
        for number, style in enumerate([*styles().values(), *wordless().values(), slider()]):
            if not style.lora.exists() and (not asked.only or style.name in asked.only):
                train_lora(style, number)
    reader = WEIGHTS / "reader.safetensors"
    if asked.step in ("reader", "all") and not reader.exists():
        train_reader(reader)
    if asked.step in ("evaluate", "all"):
        evaluate()


if __name__ == "__main__":
    main()
