"""A LoRA from a full fine-tune: ``python benchmarks/extract.py`` on the toybox.

All weights of UNet and text encoder are trained on the images of three concepts (into
``build/extract``, once), and extracted at ranks 32, 16 and 8. Writes
``benchmarks/results/extract.json`` case by case. ``error`` is ‖f_LoRA − f_tuned‖ / ‖f_base −
f_tuned‖ of the denoiser's output on prompts with backgrounds to which nothing was fitted;
``likeness`` is that of these prompts' images to the references. Ways: ``svd`` cuts each layer's
weight change at one rank, convolutions included, like kohya's extraction. ``ours`` is
``extract_lora`` at the same rank, on prompts with other backgrounds. ``all weights`` has every
layer's weight change in full. Norms and biases are those of the base.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import torch
from outputs import BUILD, QUICK, add, read, result_file
from PIL import Image
from protocol.toybox import ToyboxWorld

import toybox
from iteris_core import Calibration, Concept, Lora, LowRank
from iteris_core.edit.extract import differences, extract_lora, output_error
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.diffusers_lora import base_of
from iteris_core.linalg import truncate_matrix
from iteris_core.solve.ranks import Target
from toybox.pipeline import load
from toybox.train.base import use_plain_attention
from toybox.train.loras import fit

FILE = result_file("extract.json")
NAMES = ("sks1", "sks2", "sks3")
RANKS = (32,) if QUICK else (32, 16, 8)
STEPS, RATE = (2, 1e-4) if QUICK else (600, 2e-4)
LATENTS = 8


def tuned_folder(world: ToyboxWorld) -> Path:
    """The fine-tune; trained on first use."""
    folder = BUILD / ("quick" if QUICK else "extract") / "tuned"
    if folder.is_dir():
        return folder
    pipeline = load(toybox.BASE)
    use_plain_attention(pipeline.unet, pipeline.text_encoder)
    pictures, prompts = [], []
    for name in NAMES:
        concept = world.known[name]
        said = f"{name} {concept.class_word}"
        pictures += [Image.open(file).convert("RGB") for file in concept.references]
        prompts += [(f"a {said}", f"a photo of a {said}")] * len(concept.references)
    models = (pipeline.unet, pipeline.text_encoder)
    parameters = [p for model in models for p in model.parameters()]
    torch.manual_seed(7)
    print("loss", fit(pipeline, pictures, prompts, [{"params": parameters, "lr": RATE}], STEPS, 7))
    pipeline.save_pretrained(folder)
    return folder


def main() -> None:
    world = ToyboxWorld()
    tuned = DiffusersHost(load(tuned_folder(world)))
    base = world.host
    short = {"samples": 4, "timesteps": 1, "latents": "noise"} if QUICK else {}
    calibration = Calibration(latent_size=LATENTS, **short)
    words = [f"{name} {world.known[name].class_word}" for name in NAMES]
    seen = [text.replace("{}", said) for text in world.half["templates"] for said in words]
    wanted = world.prompted("new words", NAMES, 1)
    new = Concept(Lora({}), prompts=sorted({one.prompt for one in wanted}), trigger="new")

    def measured(lora: Lora) -> dict[str, float]:
        error = output_error(base, tuned, new, lora, calibration, lambda *_: None)
        likeness = world.mean_likeness(lora, wanted)
        numbers = sum(change.up.numel() + change.down.numel() for change in lora.sites.values())
        return {"error": round(error, 4), "likeness": round(likeness, 4), "numbers": numbers}

    dense, kind = differences(base, tuned), base_of(base.pipeline, base.sites())
    for rank in RANKS:
        if f"{rank} svd" not in read(FILE):
            cut = {s: _cut(s, dense, base, rank) for s in dense}
            add(FILE, f"{rank} svd", measured(Lora(cut)))
        if f"{rank} ours" not in read(FILE):
            found = extract_lora(
                base, tuned, Target(rank), kind, prompts=seen, calibration=calibration
            )
            reported = round(found.error, 4)
            add(FILE, f"{rank} ours", {**measured(found.lora), "reported": reported})
    if "all weights" not in read(FILE):
        whole = {s: _cut(s, dense, base, 10**6) for s in dense}
        add(FILE, "all weights", measured(Lora(whole)))
    for name, host in (("base", base), ("tuned", tuned)):
        if name not in read(FILE):
            images = [
                host.pipeline(
                    one.prompt,
                    generator=torch.Generator().manual_seed(one.seed),
                    **world.sampling,
                ).images[0]
                for one in wanted
            ]
            likeness = fmean(one["likeness"] for one in world.read(images, wanted))
            add(FILE, name, {"likeness": round(likeness, 4)})
    print(read(FILE))


def _cut(site: str, dense: dict[str, torch.Tensor], host: DiffusersHost, rank: int) -> LowRank:
    weight = host.sites()[site].weight
    kernel = tuple(weight.shape[2:]) or None
    like = LowRank(torch.zeros(1, 1), torch.zeros(1, 1), kernel)
    return truncate_matrix(dense[site], min(rank, *dense[site].shape), like=like)[0]


if __name__ == "__main__":
    main()
