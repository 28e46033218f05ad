"""Three laws on a reduced pipeline of every class: the merge of one LoRA draws what its file draws,
rows may share a forward as they like, and the written file draws what the merge draws."""

from __future__ import annotations

import functools
from pathlib import Path

import diffusers
import pytest
import torch
from architecture_results import record
from pipelines import PIPELINES, PROMPTS, Reduced, applied, draw, loaded, lora_tensors
from safetensors.torch import save_file

from iteris_core import Concept, MergeResult, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost

CALIBRATION = {"samples": 6, "timesteps": 2, "denoising_steps": 3, "seed": 3}
ALONE, ROWS, FILE = 1e-3, 5e-3, 1e-3
FAST = ("SD inpainting", "FLUX.1 Kontext", "Z-Image", "Wan 2.2 with two experts", "HunyuanVideo")
"""One of each kind: masks, references, lists, experts and frames; the others are slow tests."""

NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES]


@functools.lru_cache(maxsize=1)
def reduced_of(name: str) -> Reduced:
    return PIPELINES[name]()


def merged(reduced: Reduced, paths: list[Path], rows: int) -> MergeResult:
    host = DiffusersHost(reduced.pipeline, **reduced.call)
    prompts = list(reduced.prompts)
    concepts = [Concept(host.read_lora(path), prompts=prompts) for path in paths]
    settings = {"micro_batch": rows, **reduced.settings}
    return merge_loras(
        host, concepts, settings=settings, calibration=CALIBRATION, unmergeable="skip"
    )


def written(reduced: Reduced, path: Path, seed: int, sites=None) -> Path:
    """A random LoRA of the pipeline, of some sites alone if they are given."""
    tensors = lora_tensors(reduced.pipeline, seed)
    if sites is not None:
        tensors = {key: t for key, t in tensors.items() if key.partition(".lora_")[0] in sites}
    save_file(tensors, path)
    return path


def effect(reduced: Reduced, lora) -> list[torch.Tensor]:
    with applied(reduced.pipeline, lora):
        return drawn(reduced)


def drawn(reduced: Reduced) -> list[torch.Tensor]:
    return [draw(reduced, prompt) for prompt in (PROMPTS[1], "", PROMPTS[4])]


def furthest(ours, theirs, base) -> float:
    """Of the largest effect, over the prompts."""
    return max(
        float((a - b).norm() / (b - c).norm()) for a, b, c in zip(ours, theirs, base, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_three_laws(name, tmp_path):
    reduced = reduced_of(name)
    base = drawn(reduced)
    one = merged(reduced, [written(reduced, tmp_path / "1.safetensors", 1)], 32)
    sites = set(one.lora.sites)
    with loaded(reduced.pipeline, written(reduced, tmp_path / "a.safetensors", 1, sites)):
        theirs = drawn(reduced)
    alone = furthest(effect(reduced, one.lora), theirs, base)

    files = [written(reduced, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    both = merged(reduced, files, 32)
    many, few = both.lora, merged(reduced, files, 5).lora
    rows = max(
        float((many.sites[site].dense() - few.sites[site].dense()).norm())
        / float(few.sites[site].dense().norm())
        for site in few.sites
    )

    path = both.save(tmp_path / "m.safetensors", layout="peft", dtype="float32")
    with loaded(reduced.pipeline, path):
        theirs = drawn(reduced)
    file = furthest(effect(reduced, many), theirs, base)
    left_out = one.report.notes.get("sites", [])
    record(
        "diffusers", name, diffusers.__version__, alone=alone, rows=rows, file=file,
        **({"left_out": "; ".join(left_out)} if left_out else {}),
    )  # fmt: skip
    assert (alone < ALONE, rows < ROWS, file < FILE) == (True,) * 3, (alone, rows, file)
    assert all(torch.equal(*pair) for pair in zip(drawn(reduced), base, strict=True))
