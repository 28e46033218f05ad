"""Floor: the whole merge over one bare forward of the same 2R rows, in the same micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from models import (
    in_turn,
    medians,
    prompt_concepts,
    sd15_host,
    t5_host,
    text_concepts,
    toybox_concepts,
    toybox_host,
)

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.methods.fitting import IterisSettings
from iteris_core.passes.batches import ExecutionConfig, micro_batches
from iteris_core.passes.job import Job


def bare_forward(host: Any, concepts: Sequence[Concept], calibration: Calibration) -> None:
    """The minimum work of any merge: 2R rows through every stage, nothing collected; with a merge's
    default number at once."""
    sites = {site: None for c in concepts if c.lora is not None for site in c.lora.sites}
    references = {site: [None] * len(concepts) for site in sites}
    generator = torch.Generator().manual_seed(0)
    task = Job(host, concepts, references, calibration, generator, lambda *_: None)
    batching = ExecutionConfig(IterisSettings().micro_batch)
    with torch.no_grad(), task.run() as run:
        run.lockstep.close()
        for stage in run.stages():
            for batch in micro_batches(stage, 2, None, batching):
                batch.run()


def contenders(
    host: Any, concepts: Sequence[Concept], calibration: Calibration
) -> dict[str, Callable[[], Any]]:
    def merge(**settings: Any) -> Callable[[], Any]:
        return lambda: merge_loras(host, concepts, settings=settings, calibration=calibration)

    return {
        "merge": merge(),
        "merge without repair": merge(repair=False),
        "bare": lambda: bare_forward(host, concepts, calibration),
    }


def toybox() -> dict[str, Callable[[], Any]]:
    from toybox import TEMPLATES

    host = toybox_host()
    return contenders(
        host, toybox_concepts(host, 2), Calibration(latents="noise", templates=TEMPLATES)
    )


def t5_base() -> dict[str, Callable[[], Any]]:
    host = t5_host()
    return contenders(host, text_concepts(host, 2, 32, 50), Calibration(samples=50))


def sd15(samples: int = 16, size: int = 32) -> dict[str, Callable[[], Any]]:
    host = sd15_host()
    calibration = Calibration(samples=samples, timesteps=1, latents="noise", latent_size=size)
    return contenders(host, prompt_concepts(host, 2, 32), calibration)


MODELS: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {
    "toybox": toybox,
    "t5": t5_base,
    "sd15": sd15,
    "sd15-50": lambda: sd15(samples=50),  # as many as a merge has by default
}


def compare(model: str, rounds: int) -> dict[str, Any]:
    """Median seconds, those of every round, and ``floor``: the merge over the bare forward."""
    seconds = in_turn(MODELS[model](), rounds, warm=model == "toybox")
    found = medians(seconds)
    return {
        **found,
        "rounds": seconds,
        "floor": found["merge"] / found["bare"],
        "floor without repair": found["merge without repair"] / found["bare"],
    }
