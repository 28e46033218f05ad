"""The paper's protocol (section 4.1, table 1): several methods on one composition, with the same
scoring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from PIL import Image
from torch import Tensor

from ..concepts import Concept
from ..hosts.learned import embedding_triggers, in_force
from ..hosts.protocol import Host
from ..merge import merge_loras
from ..passes.changes import always_on
from ..progress import OnProgress, Progress
from . import ClipScorer
from .drawing import Drawing, draw
from .measures import ALONE, BASE, Measure, Stat, add_shares, fill_prompts, judged_prompts, stats_of


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


def compare_methods(
    pipeline: Any,
    host: Host,
    concepts: Sequence[Concept],
    references: Sequence[Sequence[Image.Image]],
    scorer: ClipScorer,
    *,
    methods: Sequence[str],
    templates: Sequence[str],
    drawing: Drawing,
    settings: Mapping[str, Any],
    on_progress: OnProgress = lambda progress: None,
    on_row: Callable[[Comparison], None] = lambda comparison: None,
    **how: Any,
) -> Comparison:
    """Merge ``concepts`` with every method, draw the same prompts and score them.

    As for a user, every merge goes through a file that the pipeline loads, with the LoRAs'
    embeddings active.

    :param concepts: LoRAs that are always on are part of every merge, and of each LoRA alone.
    :param references: images of each of the other concepts.
    :param methods: names of methods. ``base`` draws without a LoRA. ``alone`` draws with each LoRA
        by itself, one row per LoRA, and only the prompts on which its concept is judged, see
        :func:`.measures.judged_prompts`; the other rows then get their ``share`` of it.
    :param templates: prompts, see :func:`.measures.fill_prompts`.
    :param settings: of each method, by its name.
    :param on_row: gets the comparison so far whenever a row is finished.
    :param how: further arguments of :func:`..merge.merge_loras`, for every merge.
    """
    always = [replace(one, always_on="include") for one in always_on(concepts)]
    concepts = always_on(concepts, "no")
    prompts = fill_prompts(templates, concepts)
    measure = Measure(concepts, references, prompts, judged_prompts(templates, concepts), scorer)
    seeds = [drawing.seed + index for index in range(drawing.images_per_prompt)]
    calls = [embedding_triggers(concept) for concept in concepts]
    columns: dict[str, dict[str, Tensor]] = {}
    comparison = Comparison(prompts, measure.labels, made={"drawing": asdict(drawing)})
    every = range(len(concepts))
    rows: list[tuple[str, str, Sequence[int], Sequence[int]]] = []
    for name in methods:
        if name == ALONE:
            rows += [
                (f"{ALONE} {label}", "sum", [index], measure.judged[index])
                for index, label in enumerate(measure.labels)
            ]
        else:
            rows.append((name, name, every, range(len(prompts))))
    for name, method, merged, drawn in rows:

        def of_row(progress: Progress, name: str = name) -> None:
            on_progress(replace(progress, what=f"{name}: {progress.what}"))

        with ExitStack() as loaded:
            if method != BASE:
                result = merge_loras(
                    host,
                    [*(concepts[index] for index in merged), *always],
                    method,
                    settings=settings.get(name),
                    on_progress=of_row,
                    **how,
                )
                report = result.report
                comparison.seconds[name] = report.seconds
                comparison.settings[name] = report.settings
                if report.calibration:
                    comparison.made["calibration"] = report.calibration
                result.load_into(pipeline)
                loaded.callback(pipeline.unload_lora_weights)
            say = loaded.enter_context(in_force(pipeline, [] if method == BASE else calls))
            texts = fill_prompts(templates, concepts, say)
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
