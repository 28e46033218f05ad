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
from ..hosts.learned import calls_of
from ..hosts.learned_tokens import in_force
from ..hosts.protocol import Host
from ..merge import OnProgress, merge_loras
from ..settings import Settings, setting
from .page import html_page, html_picture, html_table, png_bytes
from .scorers import ClipScorer, DinoScorer, without_tokens
from .sheet import contact_sheet
from .statistics import Stat, columns_of, csv_table, markdown_table, over_seeds

BASE = "base"

PROMPT_LISTS: Mapping[str, tuple[str, ...]] = {
    name: tuple(
        (Path(__file__).parents[1] / "prompts" / f"{name}.txt").read_text("utf-8").splitlines()
    )
    for name in ("composition", "objects", "animals")
}
"""Our own, in the manner of the lists of DreamBooth (contexts, outfits, properties) and of
CustomConcept101 (compositions), whose own list is for research only."""


@dataclass(frozen=True)
class Drawing(Settings):
    """How pictures are drawn: the paper has 100 steps of DDPM at guidance 12."""

    images_per_prompt: int = setting(4, "Seeds per prompt.", low=1)
    steps: int = setting(25, "Denoising steps.", low=1)
    guidance: float = setting(7.5, "Guidance scale.")
    seed: int = setting(0, "Seed of the first picture of each prompt.")
    batch: int = setting(8, "Pictures that are drawn at once.", low=1)


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
        columns = columns_of(self.rows)
        cells = {name: [row.get(column) for column in columns] for name, row in self.rows.items()}
        page = html_page(
            "LoRA merge methods compared",
            [
                ("", "<p>Means ± standard errors over seeds; click a heading to sort.</p>"),
                ("", html_table(columns, cells, own="iteris")),
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
        files = {
            "comparison.json": json.dumps(data, indent=1).encode(),
            "comparison.csv": csv_table(self.rows).encode(),
            "comparison.md": markdown_table(self.rows).encode(),
            "index.html": page.encode(),
            "sheet.png": png_bytes(sheet),
        }
        for name, content in files.items():  # in full under a temporary name, then renamed
            temporary = folder / f".{name}.tmp"
            temporary.write_bytes(content)
            temporary.replace(folder / name)
        return [folder / name for name in files]


def fill_prompts(
    templates: Sequence[str],
    concepts: Sequence[Concept],
    say: Callable[[int, str], str] = lambda _, subject: subject,
) -> list[str]:
    """``{1}``, ``{2}`` … stand for the concepts, ``{all}`` for "sks1 cat and sks2 dog"; each
    concept's words are what ``say(concept, words)`` makes of them."""
    subjects = [say(index, concept.subject) for index, concept in enumerate(concepts)]
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
    Every merge goes through a file that the pipeline loads, as a user's would, with the embeddings
    in force that came with the LoRAs.
    """
    drawing = drawing or Drawing()
    prompts = fill_prompts(templates, concepts)
    seeds = [drawing.seed + index for index in range(drawing.images_per_prompt)]
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    calls = [calls_of(concept, host.learned) for concept in concepts]
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
                with in_force(pipeline, [] if name == BASE else calls) as phrases:
                    said = fill_prompts(templates, concepts, phrases)
                    pairs = [(prompt, seed) for prompt in said for seed in seeds]
                    images = draw(pipeline, pairs, drawing, tick)
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
    alignments = [(vectors @ some.mT).mean(dim=1) for some in embedded]
    kept = scorer.embed_texts([prompt for prompt, _ in wanted])
    plain = scorer.embed_texts([without_tokens(prompt, triggers) for prompt, _ in wanted])
    text = (vectors * plain).sum(dim=1)
    columns = {f"image {index}": values for index, values in enumerate(alignments, 1)}
    columns["text"] = text
    columns["text, tokens kept"] = (vectors * kept).sum(dim=1)
    columns["mean"] = (torch.stack(alignments).mean(dim=0) + text) / 2
    if dino is not None:
        for index, some in enumerate(references, 1):
            columns[f"dino {index}"] = dino.image_alignment(images, some)
    return {name: over_seeds(values.tolist(), seeds) for name, values in columns.items()}
