"""A merge by the code under test on the oracle's small module."""

from collections.abc import Generator
from contextlib import contextmanager
from unittest.mock import patch

from oracle import ModuleHost, Net, make_data

from iteris_core import Calibration, Concept, merge_loras

EXACT = {"precision": "float64", "weighting": "tokens", "shrink": 1.0, "bound": 0.0, "steps": 0}
"""A model without images has other defaults where tokens are few, and laws of the closed form have
neither a bound nor steps."""


def merge(loras, data=None, model=None, *, weights=None, strengths=None, **settings):
    data = data or make_data(len(loras))
    host = ModuleHost(model or Net(), data)
    concepts = [
        Concept(
            lora,
            prompts=["unused"],
            weight=1.0 if weights is None else weights[i],
            strength=1.0 if strengths is None else strengths[i],
        )
        for i, lora in enumerate(loras)
    ]
    return merge_loras(host, concepts, settings={**EXACT, **settings})


GUIDED = Calibration(samples=16, timesteps=3, denoising_steps=3, guidance=3.0)
"""Samples take more memory than the rest of a merge, if all are denoised at once."""


@contextmanager
def unmeasured() -> Generator[None]:
    """Merges as they are, but for the report of what they keep on held-out rows, which takes more
    forwards than a merge of a few samples."""
    with patch("iteris_core.merge.kept", lambda _, *versions: [{} for _ in versions]):
        yield
