"""The paper's protocol (section 4.1, table 1): several methods on one composition, with the same
scoring."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any, Literal, TypeVar

from PIL import Image
from torch import Tensor

from ..concepts import Calibration, Concept
from ..errors import ScoreError
from ..hosts.learned import embedding_triggers
from ..hosts.learned_tokens import in_force
from ..hosts.protocol import Host
from ..merge import MergeResult, merge_loras
from ..passes.changes import always_on
from ..presets import PresetName
from ..progress import OnProgress
from .drawing import Drawing, draw
from .judged import PROMPT_LISTS, fill_prompts, judged_prompts
from .row_scores import ALONE, BASE, Measure, add_shares, stats_of
from .scorers import ClipScorer, DinoScorer
from .statistics import Stat

_R = TypeVar("_R")
_OWN = 6
"""Images that a LoRA draws as its own references."""


@dataclass(frozen=True)
class Comparison:
    """One composition. ``rows``: method → column → value. ``pictures``: method → images in the
    order of ``prompts`` × seeds, None for prompts that a LoRA alone does not draw. ``concepts``:
    their names in columns and rows. ``settings``: method → all its settings. ``made`` describes the
    calibration and drawing."""

    rows: Mapping[str, Mapping[str, Stat]]
    pictures: Mapping[str, Sequence[Image.Image | None]]
    prompts: Sequence[str]
    seconds: Mapping[str, float]
    concepts: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    made: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


@dataclass(frozen=True)
class CompareConfig:
    """``methods`` to merge with, with ``settings`` by method over those of the ``preset``. ``base``
    draws without a LoRA. ``alone`` draws with each LoRA by itself, one row per LoRA, relative to
    which the other rows get their ``share``. ``templates`` are for :func:`.judged.fill_prompts`.
    ``collapse_below`` adds the share of concepts and images whose image alignment is below it
    (SCR)."""

    methods: Sequence[str]
    templates: Sequence[str] = PROMPT_LISTS["composition"]
    drawing: Drawing = field(default_factory=Drawing)
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    calibration: Calibration | Mapping[str, Any] = field(default_factory=dict[str, Any])
    preset: PresetName = "default"
    memory_budget: int | Literal["free"] | None = "free"
    collapse_below: float | None = None


def compare_methods(
    pipeline: Any,
    host: Host,
    concepts: Sequence[Concept],
    references: Sequence[Sequence[Image.Image]],
    config: CompareConfig,
    scorer: ClipScorer,
    *,
    dino: DinoScorer | None = None,
    on_progress: OnProgress = lambda progress: None,
    on_row: Callable[[Comparison], None] = lambda comparison: None,
    title: str = "",
) -> Comparison:
    """Merge ``concepts`` with every method of ``config``, draw the same prompts and score them.

    ``references[i]`` are images of concept i. LoRAs that are always on have none: they are part of
    every merge, and of each LoRA alone. A LoRA alone draws only the prompts on which its concept is
    judged, see :func:`judged_prompts`. As for a user, every merge goes through a file that the
    pipeline loads, with the LoRAs' embeddings active. ``on_row`` gets the comparison so far
    whenever a row is finished; ``title`` prefixes the reports to ``on_progress``.
    """
    drawing = config.drawing
    always = [replace(one, always_on="include") for one in always_on(concepts)]
    concepts = always_on(concepts, "no")
    measure = Measure(
        concepts,
        references,
        fill_prompts(config.templates, concepts),
        judged_prompts(config.templates, concepts),
        scorer,
        dino,
        config.collapse_below,
    )
    prompts, labels = measure.prompts, measure.labels
    seeds = [drawing.seed + index for index in range(drawing.images_per_prompt)]
    calls = [embedding_triggers(concept) for concept in concepts]
    columns: dict[str, dict[str, Tensor]] = {}
    comparison = Comparison({}, {}, prompts, {}, labels, made={"drawing": asdict(drawing)})
    how: dict[str, Any] = {
        name: getattr(config, name) for name in ("calibration", "preset", "memory_budget")
    }
    for name, (method, merged) in rows_of(config.methods, labels).items():
        of_row = _prefixed(on_progress, f"{title}: {name}" if title else name)
        drawn = range(len(prompts))
        if name.startswith(f"{ALONE} "):
            drawn = measure.judged[merged[0]]
        result = None
        if method != BASE:
            parts = [*(concepts[index] for index in merged), *always]
            how["settings"] = config.settings.get(name)
            result = merge_loras(host, parts, method, on_progress=of_row, **how)
            report = result.report
            made = {"calibration": report.calibration} if report.calibration else {}
            comparison = replace(
                comparison,
                seconds={**comparison.seconds, name: report.seconds},
                settings={**comparison.settings, name: report.settings},
                made={**comparison.made, **made},
            )
        called = [] if result is None else calls
        with _loaded(pipeline, result), in_force(pipeline, called) as phrases:
            texts = fill_prompts(config.templates, concepts, phrases)
            pairs = [(texts[index], seed) for index in drawn for seed in seeds]
            images = draw(pipeline, pairs, drawing, of_row)
        queue = iter(images)
        shown = [
            next(queue) if index in drawn else None for index in range(len(prompts)) for _ in seeds
        ]
        columns[name] = measure(images, drawn, merged, len(seeds))
        add_shares(columns, labels)
        stats = {row: stats_of(values, seeds) for row, values in columns.items()}
        comparison = replace(comparison, rows=stats, pictures={**comparison.pictures, name: shown})
        on_row(comparison)
    return comparison


def own_references(
    pipeline: Any,
    host: Host,
    concepts: Sequence[Concept],
    drawing: Drawing,
    on_progress: OnProgress = lambda progress: None,
) -> list[list[Image.Image]]:
    """For each concept, images by its LoRA alone: references where there are no others. Their seeds
    come after those of the comparison's images."""
    always = [replace(one, always_on="include") for one in always_on(concepts)]
    seeds = [drawing.seed + drawing.images_per_prompt + index for index in range(_OWN)]
    references: list[list[Image.Image]] = []
    for concept in always_on(concepts, "no"):
        result = merge_loras(host, [concept, *always], "sum")
        calls = [embedding_triggers(concept)]
        with _loaded(pipeline, result), in_force(pipeline, calls) as phrases:
            (prompt,) = fill_prompts(["a photo of a {1}"], [concept], phrases)
            pairs = [(prompt, seed) for seed in seeds]
            references.append(draw(pipeline, pairs, drawing, on_progress))
    return references


def _prefixed(on_progress: OnProgress, part: str) -> OnProgress:
    """``on_progress`` for one ``part`` of the comparison, which its reports name."""
    return lambda progress: on_progress(replace(progress, what=f"{part}: {progress.what}"))


@contextmanager
def _loaded(pipeline: Any, result: MergeResult | None) -> Generator[None]:
    """Context in which the pipeline has the merged LoRA loaded."""
    if result is None:
        yield
        return
    result.load_into(pipeline)
    try:
        yield
    finally:
        pipeline.unload_lora_weights()


def rows_of(methods: Sequence[str], labels: Sequence[str]) -> dict[str, tuple[str, Sequence[int]]]:
    """Row name → its method and the concepts it merges; a LoRA alone is the sum of one."""
    rows: dict[str, tuple[str, Sequence[int]]] = {}
    for name in methods:
        if name == ALONE:
            rows |= {f"{ALONE} {label}": ("sum", [index]) for index, label in enumerate(labels)}
        else:
            rows[name] = name, range(len(labels))
    return rows


def compositions(
    concepts: Sequence[Concept], references: Sequence[_R], together: int | None
) -> list[tuple[Sequence[Concept], Sequence[_R]]]:
    """Every combination of ``together`` concepts with their references, as in the paper's table 1;
    None means all at once. Each includes the LoRAs that are always on. Raises :class:`IterisError`
    if there are too few concepts."""
    always, concepts = always_on(concepts), always_on(concepts, "no")
    if together is not None and not 1 <= together <= len(concepts):
        raise ScoreError(f"{together} of {len(concepts)} concepts cannot be merged together.")
    indices = combinations(range(len(concepts)), together or len(concepts))
    return [
        ([*(concepts[i] for i in which), *always], [references[i] for i in which])
        for which in indices
    ]
