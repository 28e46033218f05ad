"""The main job on the toybox: merge two and four concepts, draw, score, and show the results.

Imported by ``iteris demo`` only; the rest of the toybox does not know the merger.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.progress import OnProgress, Progress
from iteris_core.score import ClipScorer, contact_sheet, without_tokens

from . import (
    BASE,
    ROOT,
    TEMPLATES,
    ToyConcept,
    concepts,
    load_clip,
    load_judge,
    load_pipeline,
    settings,
)
from .page import html_details, html_gallery, html_page, html_table

SETS = {"2": ("sks1", "sks4"), "4": ("sks1", "sks4", "sks6", "sks2")}
SEEDS = (11, 12, 13, 14)
LABELS = {
    "base": "no LoRA",
    "single": "each LoRA alone",
    "sum": "all at once",
    "average": "average",
    "iteris": "IterIS",
}
MERGED = ("iteris", "average", "sum")


@dataclass(frozen=True)
class Picture:
    """One picture to draw: ``concepts`` are the tokens of what it should show, left to right."""

    concepts: tuple[str, ...]
    prompt: str
    seed: int
    file: Path

    def load(self) -> Image.Image:
        return Image.open(self.file).convert("RGB")


def run(output: Path, on_progress: OnProgress) -> Table:
    """Run everything, write to ``output``, and return the score table."""
    output.mkdir(parents=True, exist_ok=True)
    _be_quiet()
    world = concepts()
    notes = {size: _merge(output, size, tokens, on_progress) for size, tokens in SETS.items()}
    pictures = {
        (size, name): _pictures(output / "pictures" / size / name, tokens)
        for size, tokens in SETS.items()
        for name in ("base", "single", *MERGED)
    }
    _draw(output, pictures, on_progress)
    scores = _score(pictures, world, on_progress)
    methods = {name: scores["4"][name] for name in (*MERGED, "single", "base")}
    data = {"methods": methods, "sets": scores, "report": notes}
    (output / "scores.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    shown = {size: _shown(pictures, size, world) for size in SETS}
    few = _shown(pictures, "4", world, few=True)
    contact_sheet(*few, cell=160, title="4 concepts in one LoRA").save(output / "sheet.png")
    page = _page(scores, notes, shown)
    (output / "index.html").write_text(page, encoding="utf-8")
    return _table(scores, output)


def _be_quiet() -> None:
    """Silence libraries: loading a small pipeline prints a lot."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _merge(output: Path, size: str, tokens: Sequence[str], on_progress: OnProgress) -> str:
    host = DiffusersHost(load_pipeline())
    world = concepts()
    chosen = [
        Concept(host.read_lora(world[t].lora), trigger=t, class_word=world[t].class_word)
        for t in tokens
    ]

    def of_size(progress: Progress) -> None:
        on_progress(replace(progress, what=f"{size} concepts: {progress.what}"))

    result = merge_loras(
        host, chosen, calibration=Calibration(templates=TEMPLATES), on_progress=of_size
    )
    result.save(output / f"merged-{size}.safetensors", overwrite=True)
    average = merge_loras(None, chosen, "average")
    average.save(output / f"average-{size}.safetensors", overwrite=True)
    return result.report.summary()


def _pictures(folder: Path, tokens: Sequence[str]) -> list[Picture]:
    """Each concept on three backgrounds, and each neighbouring pair in one picture."""
    world = concepts()
    wanted: list[tuple[tuple[str, ...], str]] = []
    for token in tokens:
        subject = f"{token} {world[token].class_word}"
        for background in world[token].backgrounds[:3]:
            wanted.append(((token,), f"a {subject} on a {background} background"))
    for left, right in zip(tokens[::2], tokens[1::2], strict=True):
        both = [b for b in world[left].backgrounds if b in world[right].backgrounds]
        prompt = (
            f"a {left} {world[left].class_word} left of a {right} {world[right].class_word} "
            f"on a {both[0]} background"
        )
        wanted.append(((left, right), prompt))
    return [
        Picture(shown, prompt, seed, folder / f"{index:02d}-{seed}.png")
        for index, (shown, prompt) in enumerate(wanted)
        for seed in SEEDS
    ]


def _draw(
    output: Path, pictures: Mapping[tuple[str, str], Sequence[Picture]], on_progress: OnProgress
) -> None:
    """Draw all images in a new process that uses only diffusers and the files."""
    world = concepts()
    jobs: list[dict[str, Any]] = []
    for (size, name), some in pictures.items():
        if name == "single":
            groups = {t: [p for p in some if p.concepts == (t,)] for t in SETS[size]}
            jobs += [_job([(world[t].lora, 1.0)], group) for t, group in groups.items()]
            continue
        loras = {
            "base": [],
            "iteris": [(output / f"merged-{size}.safetensors", 1.0)],
            "average": [(output / f"average-{size}.safetensors", 1.0)],
            "sum": [(world[t].lora, 1.0) for t in SETS[size]],
        }[name]
        jobs.append(_job(loras, some))
    plan = {"base": str(BASE), "jobs": jobs}
    plan.update({name: settings()[name] for name in ("guidance", "steps")})
    jobs_file = output / "jobs.json"
    jobs_file.write_text(json.dumps(plan), encoding="utf-8")
    command = [sys.executable, str(ROOT / "render.py"), str(jobs_file)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            done, _, total = line.strip().partition("/")
            if total.isdigit():
                on_progress(Progress("drawing in a new process", int(done), int(total)))
        if process.wait() != 0:
            errors.seek(0)
            raise RuntimeError(f"drawing failed:\n{errors.read()[-2000:]}")
    jobs_file.unlink()


def _job(loras: Sequence[tuple[Path, float]], pictures: Sequence[Picture]) -> dict[str, Any]:
    return {
        "loras": [[str(path), weight] for path, weight in loras],
        "pictures": [{"prompt": p.prompt, "seed": p.seed, "file": str(p.file)} for p in pictures],
    }


def _score(
    pictures: Mapping[tuple[str, str], Sequence[Picture]],
    world: Mapping[str, ToyConcept],
    on_progress: OnProgress,
) -> dict[str, dict[str, dict[str, float]]]:
    """Means in [0, 1] over the images of one concept; "pair" over those of two."""
    scorer = ClipScorer(*load_clip())
    judge = load_judge()
    references = {
        token: scorer.embed_images([Image.open(f).convert("RGB") for f in world[token].references])
        for token in dict.fromkeys(t for tokens in SETS.values() for t in tokens)
    }
    scores: dict[str, dict[str, dict[str, float]]] = {size: {} for size in SETS}
    for index, ((size, name), some) in enumerate(pictures.items()):
        alone = [p for p in some if len(p.concepts) == 1]
        images = [p.load() for p in alone]
        embedded = scorer.embed_images(images)
        image = torch.stack(
            [
                (references[p.concepts[0]] @ vector).mean()
                for p, vector in zip(alone, embedded, strict=True)
            ]
        )
        text = scorer.text_alignment(images, [without_tokens(p.prompt, list(world)) for p in alone])
        right = [
            sum(attributes.matches(world[p.concepts[0]].thing)) / 4
            for p, attributes in zip(alone, judge.read(images), strict=True)
        ]
        row = {
            "image": float(image.clamp(0, 1).mean()),
            "text": float(text.clamp(0, 1).mean()),
            "judge": sum(right) / len(right),
        }
        pairs = [p for p in some if len(p.concepts) == 2]
        if name != "single" and pairs:
            halves = judge.read_halves([p.load() for p in pairs])
            both = [
                sum(half.matches(world[token].thing)) / 4
                for p, two in zip(pairs, halves, strict=True)
                for token, half in zip(p.concepts, two, strict=True)
            ]
            row["pair"] = sum(both) / len(both)
        scores[size][name] = row
        on_progress(Progress("scoring", index + 1, len(pictures)))
    return scores


def _shown(
    pictures: Mapping[tuple[str, str], Sequence[Picture]],
    size: str,
    world: Mapping[str, ToyConcept],
    *,
    few: bool = False,
) -> tuple[dict[str, list[Image.Image | None]], list[str]]:
    """Rows by label, and the prompts of their columns; with ``few``, only the first prompt of each
    concept and pair."""

    def of(name: str) -> list[Picture]:
        some = [p for p in pictures[size, name] if p.seed == SEEDS[0]]
        return list({p.concepts: p for p in reversed(some)}.values())[::-1] if few else some

    shown = of("base")
    rows: dict[str, list[Image.Image | None]] = {
        "to learn": [
            Image.open(world[p.concepts[0]].references[0]) if len(p.concepts) == 1 else None
            for p in shown
        ]
    }
    for name, label in LABELS.items():
        rows[label] = [
            None if name == "single" and len(p.concepts) == 2 else p.load() for p in of(name)
        ]
    return rows, [p.prompt for p in shown]


def _page(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]],
    notes: Mapping[str, str],
    shown: Mapping[str, tuple[Mapping[str, Sequence[Image.Image | None]], Sequence[str]]],
) -> str:
    columns = ("image", "text", "judge", "pair")
    parts = [
        (
            "",
            "<p>Concepts that a small model has learnt one LoRA each, merged into one file, beside "
            "the other ways of using them together. image and text: CLIP alignment, mean cosine, "
            "rare tokens removed from the text. judge: share of shape, pattern and both colours "
            "right. pair: the same, with two concepts in one picture. A heading sorts.</p>",
        )
    ]
    for size, rows in scores.items():
        values = {LABELS[name]: [row.get(c) for c in columns] for name, row in rows.items()}
        title = f"{size} concepts in one LoRA"
        apart = [LABELS["base"], LABELS["single"]]
        body = html_table(columns, values, LABELS["iteris"], f"Scores: {title}", apart=apart)
        body += html_gallery(
            *shown[size], caption=f"Pictures: {title}", highlighted=LABELS["iteris"]
        )
        parts.append((title, body + html_details("What the merge says", notes[size])))
    return html_page("IterIS on the toybox", parts)


def _table(scores: Mapping[str, Mapping[str, Mapping[str, float]]], output: Path) -> Table:
    table = Table(title=f"Scores ({output / 'index.html'})")
    for column in ("concepts", "method", "image", "text", "judge", "pair"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for size, rows in scores.items():
        for name, row in rows.items():
            cells = [
                f"{row[c]:.3f}" if c in row else "" for c in ("image", "text", "judge", "pair")
            ]
            table.add_row(size, name, *cells)
    return table
