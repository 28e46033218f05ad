"""The paper's protocol (section 4.1, table 1): several methods on one composition, with the same
scoring."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from ..concepts import Calibration, Concept
from ..hosts.learned import embedding_triggers, in_force
from ..hosts.protocol import Host
from ..hosts.sample_store import SampleStore
from ..merge import MergeResult, merge_loras
from ..passes.changes import always_on
from ..progress import OnProgress, Progress
from ..settings import PresetName
from . import ClipScorer, DinoScorer
from .drawing import Drawing, draw
from .measures import (
    ALONE,
    BASE,
    PROMPT_LISTS,
    Measure,
    Stat,
    add_shares,
    fill_prompts,
    judged_prompts,
    stats_of,
)

_OWN = 6
"""Images that a LoRA draws as its own references."""


@dataclass
class Comparison:
    """What a comparison has finished. ``rows``: method → column → value. ``pictures``: method →
    images in the order of ``prompts`` × seeds, None for prompts that a LoRA alone does not draw.
    ``concepts``: their names in columns and rows. ``settings``: method → all its settings. ``made``
    describes the calibration and drawing."""

    prompts: Sequence[str]
    concepts: Sequence[str] = ()
    rows: dict[str, dict[str, Stat]] = field(default_factory=dict[str, dict[str, Stat]])
    pictures: dict[str, list[Image.Image | None]] = field(
        default_factory=dict[str, "list[Image.Image | None]"]
    )
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    settings: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    made: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


@dataclass(frozen=True)
class CompareConfig:
    """``methods`` to merge with, with ``settings`` by method over those of the ``preset``. ``base``
    draws without a LoRA. ``alone`` draws with each LoRA by itself, one row per LoRA, relative to
    which the other rows get their ``share``. ``templates``: see :func:`.measures.fill_prompts`."""

    methods: Sequence[str]
    templates: Sequence[str] = PROMPT_LISTS["composition"]
    drawing: Drawing = field(default_factory=Drawing)
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    calibration: Calibration | Mapping[str, Any] = field(default_factory=dict[str, Any])
    preset: PresetName = "default"
    memory_budget: int | Literal["free"] | None = "free"
    store: SampleStore | None = None


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
) -> Comparison:
    """Merge ``concepts`` with every method of ``config``, draw the same prompts and score them.

    ``references[i]`` are images of concept i. LoRAs that are always on have none: they are part of
    every merge, and of each LoRA alone. A LoRA alone draws only the prompts on which its concept is
    judged, see :func:`judged_prompts`. As for a user, every merge goes through a file that the
    pipeline loads, with the LoRAs' embeddings active. ``on_row`` gets the comparison so far
    whenever a row is finished.
    """
    drawing = config.drawing
    always = [replace(one, always_on="include") for one in always_on(concepts)]
    concepts = always_on(concepts, "no")
    prompts = fill_prompts(config.templates, concepts)
    judged = judged_prompts(config.templates, concepts)
    measure = Measure(concepts, references, prompts, judged, scorer, dino)
    seeds = [drawing.seed + index for index in range(drawing.images_per_prompt)]
    calls = [embedding_triggers(concept) for concept in concepts]
    columns: dict[str, dict[str, Tensor]] = {}
    comparison = Comparison(prompts, measure.labels, made={"drawing": asdict(drawing)})
    for name, (method, merged) in rows_of(config.methods, measure.labels).items():

        def of_row(progress: Progress, name: str = name) -> None:
            on_progress(replace(progress, what=f"{name}: {progress.what}"))

        drawn = judged[merged[0]] if name.startswith(f"{ALONE} ") else range(len(prompts))
        result = None
        if method != BASE:
            result = merge_loras(
                host,
                [*(concepts[index] for index in merged), *always],
                method,
                preset=config.preset,
                settings=config.settings.get(name),
                calibration=config.calibration,
                memory_budget=config.memory_budget,
                store=config.store,
                on_progress=of_row,
            )
            report = result.report
            comparison.seconds[name] = report.seconds
            comparison.settings[name] = report.settings
            if report.calibration:
                comparison.made["calibration"] = report.calibration
        called = [] if result is None else calls
        with _loaded(pipeline, result), in_force(pipeline, called) as phrases:
            texts = fill_prompts(config.templates, concepts, phrases)
            pairs = [(texts[index], seed) for index in drawn for seed in seeds]
            images = draw(pipeline, pairs, drawing, of_row)
        queue = iter(images)
        comparison.pictures[name] = [
            next(queue) if index in drawn else None for index in range(len(prompts)) for _ in seeds
        ]
        columns[name] = measure(images, drawn, merged, len(seeds))
        add_shares(columns, measure.labels)
        comparison.rows = {row: stats_of(values, seeds) for row, values in columns.items()}
        on_row(comparison)
    return comparison


def own_references(
    pipeline: Any,
    host: Host,
    concepts: Sequence[Concept],
    drawing: Drawing,
    on_progress: OnProgress = lambda progress: None,
) -> list[list[Image.Image]]:
    """For each concept, images by its LoRA alone, with seeds after the comparison's."""
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


@contextmanager
def _loaded(pipeline: Any, result: MergeResult | None) -> Generator[None]:
    """Context in which the pipeline has the merged LoRA loaded."""
    if result is not None:
        result.load_into(pipeline)
    try:
        yield
    finally:
        if result is not None:
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
