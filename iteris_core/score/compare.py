"""The paper's protocol (section 4.1, table 1): several methods, one composition, scored alike."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ..concepts import Calibration, Concept
from ..errors import IterisError
from ..hosts.learned import calls_of
from ..hosts.learned_tokens import in_force
from ..hosts.protocol import Host
from ..merge import merge_loras
from ..presets import PresetName
from ..progress import OnProgress
from .drawing import Drawing, draw
from .measures import collapse_rate, share_of_alone
from .scorers import ClipScorer, DinoScorer, without_tokens
from .statistics import Stat, over_seeds
from .told import ALONE, BASE, Told

PROMPT_LISTS: Mapping[str, tuple[str, ...]] = {
    name: tuple(
        (Path(__file__).parents[1] / "prompts" / f"{name}.txt").read_text("utf-8").splitlines()
    )
    for name in ("composition", "objects", "animals")
}
"""Our own, in the manner of the lists of DreamBooth (contexts, outfits, properties) and of
CustomConcept101 (compositions), whose own list is for research only."""


@dataclass(frozen=True)
class Comparison:
    """One composition. ``rows``: method → column → value; ``pictures``: method → in the order of
    ``prompts`` × seeds; ``settings``: method → all of its settings; ``made`` is how features were
    collected and pictures drawn."""

    rows: Mapping[str, Mapping[str, Stat]]
    pictures: Mapping[str, Sequence[Image.Image]]
    prompts: Sequence[str]
    seconds: Mapping[str, float]
    concepts: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    made: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


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
    preset: PresetName = "default",
    memory_budget: int | Literal["free"] | None = "free",
    dino: DinoScorer | None = None,
    collapse_below: float | None = None,
    on_progress: OnProgress = lambda progress: None,
) -> Comparison:
    """Merge ``concepts`` with every one of ``methods``, draw the same prompts and score them.

    ``references[i]`` are pictures of concept i. ``base`` among the methods draws without a LoRA,
    ``alone`` with each of them by itself, in the rows ``alone 1``, ``alone 2`` and so on, from
    which the other rows have their ``share``. ``collapse_below`` adds the share of concepts and
    pictures whose image alignment is under it (SCR). Every merge goes through a file that the
    pipeline loads, as a user's would, with the embeddings in force that came with the LoRAs.
    ``settings`` are by method.
    """
    drawing = drawing or Drawing()
    prompts = fill_prompts(templates, concepts)
    seeds = [drawing.seed + index for index in range(drawing.images_per_prompt)]
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    calls = [calls_of(concept, host.learned) for concept in concepts]
    columns: dict[str, dict[str, Tensor]] = {}
    pictures: dict[str, list[Image.Image]] = {}
    seconds: dict[str, float] = {}
    used: dict[str, Mapping[str, Any]] = {}
    made: dict[str, Mapping[str, Any]] = {"drawing": asdict(drawing)}
    embedded = [scorer.embed_images(some) for some in references]
    wanted_rows = rows_of(methods, len(concepts))
    told = Told({name: method for name, (method, _) in wanted_rows.items()}, on_progress)
    for name, (method, merged) in wanted_rows.items():
        of_method = told.of(name)

        with tempfile.TemporaryDirectory() as folder:
            if method != BASE:
                result = merge_loras(
                    host,
                    [concepts[index] for index in merged],
                    method,
                    settings=(settings or {}).get(name),
                    calibration=calibration,
                    preset=preset,
                    memory_budget=memory_budget,
                    on_progress=of_method,
                )
                seconds[name], used[name] = result.report.seconds, result.report.settings
                if result.report.calibration:
                    made["calibration"] = result.report.calibration
                path = result.save(Path(folder) / "merged.safetensors", dtype="float32")
                pipeline.load_lora_weights(str(path))
            try:
                with in_force(pipeline, [] if method == BASE else calls) as phrases:
                    said = fill_prompts(templates, concepts, phrases)
                    pairs = [(prompt, seed) for prompt in said for seed in seeds]
                    images = draw(pipeline, pairs, drawing, of_method)
            finally:
                if method != BASE:
                    pipeline.unload_lora_weights()
        pictures[name] = images
        columns[name] = _score(images, wanted, concepts, embedded, references, scorer, dino)
        if collapse_below is not None:
            columns[name]["collapsed"] = _collapsed(columns[name], len(concepts), collapse_below)
    if ALONE in methods:
        _add_shares(columns, len(concepts))
    drawn = [seed for _, seed in wanted]
    rows = {
        name: {column: over_seeds(values.tolist(), drawn) for column, values in row.items()}
        for name, row in columns.items()
    }
    names = [concept.name for concept in concepts]
    return Comparison(rows, pictures, prompts, seconds, names, used, made)


def rows_of(methods: Sequence[str], count: int) -> dict[str, tuple[str, Sequence[int]]]:
    """Name of a row → its method and which of ``count`` concepts it merges; a LoRA alone is the
    sum of one."""
    rows: dict[str, tuple[str, Sequence[int]]] = {}
    for name in methods:
        if name == ALONE:
            rows |= {f"{ALONE} {index + 1}": ("sum", [index]) for index in range(count)}
        else:
            rows[name] = name, range(count)
    return rows


def compare_compositions(
    concepts: Sequence[Concept],
    references: Sequence[Sequence[Image.Image]],
    together: int | None,
    compare: Callable[[Sequence[Concept], Sequence[Sequence[Image.Image]], str], Comparison],
) -> list[Comparison]:
    """``compare(concepts, references, name)`` for every ``together`` of the concepts, as in the
    paper's table 1; None takes all of them at once."""
    together = len(concepts) if together is None else together
    if not 1 <= together <= len(concepts):
        raise IterisError(f"{together} of {len(concepts)} concepts cannot be merged together.")
    pairs = list(zip(concepts, references, strict=True))
    found: list[Comparison] = []
    for some in combinations(pairs, together):
        name = " + ".join(concept.name for concept, _ in some)
        found.append(compare([c for c, _ in some], [r for _, r in some], name))
    return found


def _score(
    images: Sequence[Image.Image],
    wanted: Sequence[tuple[str, int]],
    concepts: Sequence[Concept],
    embedded: Sequence[Tensor],
    references: Sequence[Sequence[Image.Image]],
    scorer: ClipScorer,
    dino: DinoScorer | None,
) -> dict[str, Tensor]:
    """column → a value for each picture"""
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
    return columns


def _collapsed(columns: Mapping[str, Tensor], count: int, below: float) -> Tensor:
    """Of each picture the share of concepts that are lost in it."""
    likeness = torch.stack([columns[f"image {i + 1}"] for i in range(count)], dim=1)
    return torch.tensor([collapse_rate(some, below) for some in likeness.tolist()])


def _add_shares(columns: Mapping[str, dict[str, Tensor]], count: int) -> None:
    """What each row has of each concept's likeness where its LoRA is alone, on the same prompts."""
    names = [f"image {i + 1}" for i in range(count)]
    alone = [float(columns[f"{ALONE} {i + 1}"][name].mean()) for i, name in enumerate(names)]
    for row, values in columns.items():
        if not row.startswith(f"{ALONE} "):
            of = zip(names, alone, strict=True)
            shares = [values[name] * share_of_alone(1.0, most) for name, most in of]
            values["share"] = torch.stack(shares).mean(dim=0)
