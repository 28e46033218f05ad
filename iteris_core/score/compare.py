"""The paper's protocol (section 4.1, table 1): several methods, one composition, scored alike."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..concepts import Calibration, Concept
from ..errors import IterisError
from ..hosts.protocol import Host
from ..merge import merge_loras
from .clip import ClipScorer, without_tokens
from .dino import DinoScorer
from .page import html_page, html_picture, html_table, png_bytes
from .prompts import PROMPT_LISTS
from .sheet import contact_sheet
from .statistics import Stat, csv_table, markdown_table, over_seeds

BASE = "base"

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: the paper has 100 steps of DDPM at guidance 12."""

    images_per_prompt: int = 4
    steps: int = 25
    guidance: float = 7.5
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        for name in ("images_per_prompt", "steps", "batch"):
            if getattr(self, name) < 1:
                raise IterisError(f"{name} must be at least 1, not {getattr(self, name)}.")


@dataclass(frozen=True)
class Comparison:
    """``rows``: method → column → value; ``pictures``: method → in the order of ``prompts`` ×
    seeds."""

    rows: Mapping[str, Mapping[str, Stat]]
    pictures: Mapping[str, Sequence[Image.Image]]
    prompts: Sequence[str]
    seconds: Mapping[str, float]

    def write(self, folder: Path) -> list[Path]:
        """comparison.json, .csv, .md, sheet.png and index.html; returns what was written."""
        folder.mkdir(parents=True, exist_ok=True)
        per_prompt = len(next(iter(self.pictures.values()))) // len(self.prompts)
        shown = {name: list(some[::per_prompt]) for name, some in self.pictures.items()}
        sheet = contact_sheet(shown, self.prompts, cell=192 if len(self.prompts) < 9 else 128)
        columns = list(dict.fromkeys(c for row in self.rows.values() for c in row))
        values = {
            name: [row[c].mean if c in row else None for c in columns]
            for name, row in self.rows.items()
        }
        errors = {
            name: [row[c].to_dict()["se"] if c in row else None for c in columns]
            for name, row in self.rows.items()
        }
        page = html_page(
            "LoRA merge methods compared",
            [
                ("", "<p>Means ± standard errors over seeds; click a heading to sort.</p>"),
                ("", html_table(columns, values, own="iteris", errors=errors)),
                ("", html_picture(sheet, "pictures")),
            ],
        )
        data = {
            "methods": {
                name: {column: stat.to_dict() for column, stat in row.items()}
                for name, row in self.rows.items()
            },
            "prompts": list(self.prompts),
            "seconds": dict(self.seconds),
        }
        texts = {
            "comparison.json": json.dumps(data, indent=1),
            "comparison.csv": csv_table(self.rows),
            "comparison.md": markdown_table(self.rows),
            "index.html": page,
        }
        for name, text in texts.items():
            _replace(folder / name, text.encode())
        _replace(folder / "sheet.png", png_bytes(sheet))
        return [*(folder / name for name in texts), folder / "sheet.png"]


def _replace(path: Path, data: bytes) -> None:
    """Written in full under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def fill_prompts(templates: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """``{1}``, ``{2}`` … stand for the concepts, ``{all}`` for "sks1 cat and sks2 dog"."""
    subjects = [concept.subject for concept in concepts]
    prompts: list[str] = []
    for template in templates:
        prompt = template.replace("{all}", " and ".join(f"a {subject}" for subject in subjects))
        for index, subject in enumerate(subjects, 1):
            prompt = prompt.replace(f"{{{index}}}", subject)
        if "{" in prompt:
            raise IterisError(
                f"Prompt {template!r} has a placeholder that is not {{all}} or {{1}} to "
                f"{{{len(subjects)}}}."
            )
        prompts.append(prompt)
    if not prompts:
        raise IterisError("There are no prompts to draw.")
    return prompts


def compare_methods(
    pipeline: Any,
    host: Host,
    concepts: Sequence[Concept],
    references: Sequence[Sequence[Image.Image]],
    methods: Sequence[str],
    scorer: ClipScorer,
    *,
    templates: Sequence[str] = PROMPT_LISTS["composition"],
    drawing: Drawing | None = None,
    calibration: Calibration | None = None,
    settings: Mapping[str, Any] | None = None,
    dino: DinoScorer | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Comparison:
    """Merge ``concepts`` with every one of ``methods``, draw the same prompts and score them.

    ``references[i]`` are pictures of concept i. ``base`` among the methods draws without a LoRA.
    Every merge goes through a file that the pipeline loads, as a user's would.
    """
    drawing = drawing or Drawing()
    prompts = fill_prompts(templates, concepts)
    seeds = [drawing.seed + index for index in range(drawing.images_per_prompt)]
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    rows: dict[str, dict[str, Stat]] = {}
    pictures: dict[str, list[Image.Image]] = {}
    seconds: dict[str, float] = {}
    embedded = [scorer.embed_images(some) for some in references]
    for name in methods:

        def tick(what: str, done: int, total: int, name: str = name) -> None:
            on_progress(f"{name}: {what}", done, total)

        with tempfile.TemporaryDirectory() as folder:
            if name != BASE:
                result = merge_loras(
                    host,
                    concepts,
                    name,
                    settings=(settings or {}).get(name),
                    calibration=calibration,
                    on_progress=tick,
                )
                seconds[name] = result.report.seconds
                path = result.save(Path(folder) / "merged.safetensors", dtype="float32")
                pipeline.load_lora_weights(str(path))
            try:
                images = draw(pipeline, wanted, drawing, tick)
            finally:
                if name != BASE:
                    pipeline.unload_lora_weights()
        pictures[name] = images
        rows[name] = _score(images, wanted, concepts, embedded, references, scorer, dino)
    return Comparison(rows, pictures, prompts, seconds)


def draw(
    pipeline: Any,
    wanted: Sequence[tuple[str, int]],
    drawing: Drawing,
    on_progress: OnProgress = lambda what, done, total: None,
) -> list[Image.Image]:
    """One picture for each (prompt, seed)."""
    images: list[Image.Image] = []
    for start in range(0, len(wanted), drawing.batch):
        some = wanted[start : start + drawing.batch]
        images += pipeline(
            [prompt for prompt, _ in some],
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance,
            generator=[torch.Generator().manual_seed(seed) for _, seed in some],
        ).images
        on_progress("drawing", len(images), len(wanted))
    return images


def _score(
    images: Sequence[Image.Image],
    wanted: Sequence[tuple[str, int]],
    concepts: Sequence[Concept],
    embedded: Sequence[torch.Tensor],
    references: Sequence[Sequence[Image.Image]],
    scorer: ClipScorer,
    dino: DinoScorer | None,
) -> dict[str, Stat]:
    seeds = [seed for _, seed in wanted]
    triggers = [concept.trigger for concept in concepts if concept.trigger]
    vectors = scorer.embed_images(images)
    row: dict[str, Stat] = {}
    for index, some in enumerate(embedded, 1):
        row[f"image {index}"] = over_seeds((vectors @ some.mT).mean(dim=1).tolist(), seeds)
    plain = scorer.embed_texts([without_tokens(prompt, triggers) for prompt, _ in wanted])
    kept = scorer.embed_texts([prompt for prompt, _ in wanted])
    row["text"] = over_seeds((vectors * plain).sum(dim=1).tolist(), seeds)
    row["text, tokens kept"] = over_seeds((vectors * kept).sum(dim=1).tolist(), seeds)
    image = torch.stack([(vectors @ some.mT).mean(dim=1) for some in embedded]).mean(dim=0)
    both = (image + (vectors * plain).sum(dim=1)) / 2
    row["mean"] = over_seeds(both.tolist(), seeds)
    if dino is not None:
        for index, some in enumerate(references, 1):
            row[f"dino {index}"] = over_seeds(dino.image_alignment(images, some).tolist(), seeds)
    return row
