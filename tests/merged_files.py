"""A fixed set of small merges, and the files that they write.

``python tests/merged_files.py`` writes :data:`KEPT` anew; with ``--diff`` it names the merges that
differ from it. Use it to check that a change of the code keeps every merged file.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from bases import make_lora, tiny
from forced_plans import CPU, planned_as
from host_cases import MAKERS, DiffusersCase, make_case, two_concepts
from pipelines import PIPELINES
from pipelines import write_lora as write_reduced
from small_merge import unmeasured
from tiny import random_lora

from iteris_core import Concept, Lora, MergeResult, all_methods, merge_loras, write_lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.lora_files import read_tensors
from iteris_core.lora_files.experts import split_experts
from iteris_core.passes import sweep
from iteris_core.solve.choose import THRESHOLDS

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import rivals  # noqa: F401 (registers them)

KEPT = Path(__file__).with_suffix(".json")
QUICK = {"samples": 3, "timesteps": 2, "denoising_steps": 3, "latent_size": 8, "seed": 3}
LAYOUTS = ("kohya", "peft")
CLOSED = {"steps": 0}
"""Steps hide in what a merge rounds where a closed form differs."""
ITERIS: Mapping[str, Mapping[str, Any]] = {
    "adapter": {"objective": "adapter", "weighting": "adapter", "ridge": 1e-4},
    "jacobi": {"schedule": "jacobi", "iterations": 3, "repair": False, "saliency": 0.0},
    "jacobi with repair": {"schedule": "jacobi", "iterations": 2},
    "no repair": {"repair": False},
    "float64": {"precision": "float64"},
    "of a rank": {"rank": 3},
    "of shared ranks": {"rank": 3, "share_ranks": True},
    "of a share of energy": {"rank": 0.9},
    "few tokens": {"row_tokens": 7, "saliency": 0.5},
    "full weighting": {"weighting": "full", "shrink": 0.8},
    "micro-batches": {"micro_batch": 3},
    "steps": {"steps": 2},
}
PRESETS = ("fast", "paper")
WAYS: Mapping[str, tuple[int, bool]] = {
    "in host memory": (0, True),
    "small blocks": (THRESHOLDS.blocks[0], False),
    "large blocks in host memory": (THRESHOLDS.blocks[1], True),
}


@dataclass(frozen=True)
class Written:
    """What a merge's files hold: ``names`` digests names, shapes and dtypes, ``bits`` the values;
    ``values`` are numbers that change with them, which hold on any machine to a few digits."""

    names: str
    bits: str
    values: list[float]


def machine() -> str:
    """Where ``bits`` hold, of one thread."""
    versions = [f"{m.__name__} {m.__version__}" for m in (torch, diffusers, transformers)]
    return ", ".join([*versions, _processor(), torch.backends.cpu.get_cpu_capability()])


def _processor() -> str:
    """Libraries of linear algebra choose their code by the model."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def merges() -> dict[str, Callable[[Path], list[Path]]]:
    """name → a function that merges and writes its files into a folder."""
    found: dict[str, Callable[[Path], list[Path]]] = {}
    for method in all_methods():
        if method.name != "iteris":
            found[method.name] = _pipeline("sd1", method.name)
    for kind in ("sd1", "sdxl", "sd3", "flux"):
        found[f"iteris, {kind}"] = _pipeline(kind, settings=CLOSED)
    for name, settings in ITERIS.items():
        found[f"iteris, {name}"] = _pipeline("sd1", settings={**CLOSED, **settings})
    for preset in PRESETS:
        settings = {"iterations": 2} if preset == "paper" else {}
        found[f"iteris, preset {preset}"] = _pipeline("sd1", preset=preset, settings=settings)
    for kind in MAKERS:
        found[f"iteris, {kind} of transformers"] = _language(kind)
    for name, (most, parked) in WAYS.items():
        found[f"iteris, {name}"] = _way(most, parked)
    found["iteris, experts"] = _experts
    found["iteris, embeddings"] = _embeddings
    found["iteris, words and strengths"] = _words
    found["iteris, ten prompts kept"] = _preserved
    return found


def written(name: str) -> Written:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, unmeasured():  # it changes no tensor
        return _digest(merges()[name](Path(folder)))


def _digest(files: list[Path]) -> Written:
    names, bits, values = hashlib.sha256(), hashlib.sha256(), []
    for file in sorted(files):
        tensors, _ = read_tensors(file)
        total = torch.zeros(3, dtype=torch.float64)
        for key in sorted(tensors):
            tensor = tensors[key].contiguous()
            about = f"{file.name} {key} {tuple(tensor.shape)} {tensor.dtype}\n"
            names.update(about.encode())
            bits.update(about.encode())
            bits.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for product in _products(tensors):
            wave = torch.arange(1, product.numel() + 1, dtype=torch.float64)
            flat = product.reshape(-1).double()
            total += torch.stack([flat.square().sum(), *(flat @ (wave * f).sin() for f in (1, 2))])
        values += [float(f"{v:.6g}") for v in total]
    return Written(names.hexdigest()[:16], bits.hexdigest()[:16], values)


def _products(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """up · down of each pair, since factors alone may turn; other tensors as they are."""
    pairs = {".lora_up.weight": ".lora_down.weight", ".lora_B.weight": ".lora_A.weight"}
    found = []
    for key, tensor in sorted(tensors.items()):
        end = next((e for e in pairs if key.endswith(e)), None)
        if end is not None:
            down = tensors[key.removesuffix(end) + pairs[end]]
            found.append(tensor.float().flatten(1) @ down.float().flatten(1))
        elif not key.endswith(tuple(pairs.values())):
            found.append(tensor.float())
    return found


def _save(result: MergeResult, folder: Path, layouts=LAYOUTS) -> list[Path]:
    return [
        path
        for layout in layouts
        for path in (result.save(folder / f"{layout}.safetensors", layout=layout),)
    ]


def _pipeline(
    kind: str, method: str = "iteris", preset: Any = "default", settings: Any = None
) -> Callable[[Path], list[Path]]:
    def run(folder: Path) -> list[Path]:
        host = DiffusersHost(copy.deepcopy(tiny(kind)))
        concepts = [
            Concept(make_lora(kind, _some(kind), seed), trigger=f"s{seed}", class_word="dog")
            for seed in (1, 2)
        ]
        result = merge_loras(
            host, concepts, method, preset=preset, settings=settings or {}, calibration=QUICK
        )
        return _save(result, folder, LAYOUTS if kind == "sd1" else ("peft",))

    return run


@functools.cache
def _some(kind: str) -> tuple[str, ...]:
    """Attention, feed-forward and modulation of every component, and a convolution."""
    parts = ("to_q", ".ff.net.2", "q_proj") if kind == "sdxl" else ("",)
    return tuple(
        site
        for site in DiffusersHost(tiny(kind)).sites()
        if (DiffusersCase.some(site) and any(part in site for part in parts))
        or site.endswith("down_blocks.0.resnets.0.conv1")
    )


def _language(kind: str) -> Callable[[Path], list[Path]]:
    def run(folder: Path) -> list[Path]:
        case = make_case(kind)
        result = merge_loras(case.host, two_concepts(case), calibration={"samples": 5, "seed": 3})
        return _save(result, folder, ("peft",))

    return run


def _way(most: int, parked: bool) -> Callable[[Path], list[Path]]:
    """A sweep in blocks of so many barriers, whose rows wait in host memory."""

    def run(folder: Path) -> list[Path]:
        plan, sweep.planned = sweep.planned, planned_as(most, CPU if parked else None)
        try:
            return _pipeline("flux", settings=CLOSED)(folder)
        finally:
            sweep.planned = plan

    return run


def _experts(folder: Path) -> list[Path]:
    reduced = PIPELINES["Wan 2.2 with two experts"]()
    host = DiffusersHost(reduced.pipeline, **reduced.call)
    concepts = []
    for seed in (1, 2):
        path = write_reduced(folder / f"{seed}.safetensors", reduced.pipeline, seed)
        concepts.append(Concept(host.read_lora(path), prompts=list(reduced.prompts)))
        path.unlink()
    result = merge_loras(host, concepts, settings={**CLOSED, **reduced.settings}, calibration={
        "samples": 3, "timesteps": 2, "denoising_steps": 3, "seed": 3,
    })  # fmt: skip
    parts = split_experts(result.lora, host.experts)
    return [
        write_lora(p, folder / f"{i}.safetensors", layout="peft")
        for i, p in enumerate(parts)
        if p.sites
    ]


def _embeddings(folder: Path) -> list[Path]:
    host = DiffusersHost(copy.deepcopy(tiny("sd1")))
    generator = torch.Generator().manual_seed(4)
    concepts = []
    for seed, name, count in ((1, "toy", 1), (2, "<cat>", 2)):
        vectors = {"emb_params": torch.randn(count, 32, generator=generator)}
        lora = replace(make_lora("sd1", _some("sd1"), seed), embeddings={name: vectors})
        concepts.append(Concept(lora, trigger=name, class_word="dog"))
    result = merge_loras(host, concepts, settings=CLOSED, calibration=QUICK)
    _save(result, folder)
    return sorted(folder.glob("**/*.safetensors"))


def _words(folder: Path) -> list[Path]:
    """Prompts, subjects, strengths, weights, and a LoRA that says nothing of the text encoder."""
    host = DiffusersHost(copy.deepcopy(tiny("sd1")))
    third = random_lora(host, 3, 3)
    concepts = [
        Concept(make_lora("sd1", _some("sd1"), 1), prompts=["a dog", "s1 dog"], strength=0.8),
        Concept(make_lora("sd1", _some("sd1"), 2), subjects=("s2 dog", "s3 cat"), weight=2.0),
        Concept(third, trigger="s4", kind="style", text_strength=0.5),
        Concept(Lora(third.sites, "off"), trigger="s5", strength=0.0),
    ]
    return _save(merge_loras(host, concepts, settings=CLOSED, calibration=QUICK), folder)


def _preserved(folder: Path) -> list[Path]:
    host = DiffusersHost(copy.deepcopy(tiny("sd1")))
    concepts = [
        Concept(make_lora("sd1", _some("sd1"), 1), trigger="s1"),
        Concept.preserve([f"a {letter}" for letter in "abcdefghij"]),
    ]
    calibration = {**QUICK, "generic": 0.0, "contexts": 0.0, "latents": "noise"}
    result = merge_loras(host, concepts, settings=CLOSED, calibration=calibration)
    return _save(result, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--diff", action="store_true")
    torch.set_num_threads(1)
    diff = parser.parse_args().diff
    found = {name: asdict(written(name)) for name in merges()}
    if diff:
        kept = json.loads(KEPT.read_text())["merges"]
        differ = [n for n in {**kept, **found} if kept.get(n) != found.get(n)]
        raise SystemExit(f"These differ: {differ}" if differ else None)
    KEPT.write_text(json.dumps({"machine": machine(), "merges": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
