"""The step `evaluate`: writes quality.json beside the weights, with the times of every step."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from .. import concepts, load_clip, load_judge, load_pipeline, pivotal_concepts
from ..evaluate import concept_prompts, load_concept, measure_base, measure_concept, sample, sheet
from .clip import measure as measure_clip
from .judge import measure as measure_judge

log = logging.getLogger(__name__)
EARLIER = ("ae", "judge", "clip", "latents", "base", "decoder", "loras", "pivotal")


def train(work: Path, weights: Path) -> dict[str, Any]:
    """Measure everything; sheets of pictures go to `work`/sheets."""
    judge, pipeline = load_judge(), load_pipeline()
    load_clip()
    figures: dict[str, Any] = {
        "judge": measure_judge(judge),
        "clip_top1_of_32": measure_clip(weights / "clip"),
        "base": measure_base(pipeline, judge, 192),
        "concepts": {},
    }
    log.info("%s", figures)
    sheets = work / "sheets"
    sheets.mkdir(parents=True, exist_ok=True)
    for token, concept in {**concepts(), **pivotal_concepts()}.items():
        pipeline = load_pipeline()
        load_concept(pipeline, concept)
        figures["concepts"][token] = measure_concept(pipeline, judge, concept, 42)
        log.info("%s %s", token, figures["concepts"][token])
        sheet(sample(pipeline, concept_prompts(concept, 20)), sheets / f"{token.strip('<>')}.png")
    figures["times"] = {}
    for step in EARLIER:
        path = work / f"{step}.json"
        if path.exists():
            figures["times"] |= {
                k: v for k, v in json.loads(path.read_text()).items() if k.endswith("seconds")
            }
    target = weights.parent / "quality.json"
    target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return {"written": str(target)}
