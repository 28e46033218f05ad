"""Three laws on a reduced pipeline of every class: the merge of one LoRA draws what its file draws,
rows may share a forward as they like, and the written file draws what the merge draws."""

from __future__ import annotations

import diffusers
import pytest
from architecture_results import record
from pipelines import PIPELINES
from pipelines.laws import Laws

from iteris_core import architectures

ALONE, ROWS, FILE = 1e-3, 5e-3, 1e-3
FAST = ("SD inpainting", "FLUX.1 Kontext", "Z-Image", "Wan 2.2 with two experts", "HunyuanVideo")
"""One of each kind: masks, references, lists, experts and frames; the others are slow tests."""

NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES]


@pytest.mark.parametrize("name", NAMES)
def test_three_laws(name, tmp_path):
    laws = Laws(PIPELINES[name](), tmp_path)
    alone = laws.alone()
    rows, file = laws.rows_and_file()
    left_out = {"left_out": laws.left_out} if laws.left_out else {}
    figures = {"alone": alone, "rows": rows, "file": file, **left_out}
    record("diffusers", name, diffusers.__version__, **figures)
    assert (alone < ALONE, rows < ROWS, file < FILE) == (True,) * 3, figures
    assert laws.unchanged()


def test_a_class_that_nothing_names(tmp_path, monkeypatch):
    """Tomorrow's: of other names than today's, and of no architecture that is known."""
    monkeypatch.setattr(architectures, "_registered", ())
    reduced = PIPELINES["FLUX.1"]()
    for thing in (reduced.pipeline, reduced.pipeline.transformer):
        thing.__class__ = type("Tomorrow", (type(thing),), {})
    laws = Laws(reduced, tmp_path)
    assert laws.alone() < ALONE
    rows, file = laws.rows_and_file()
    assert (rows < ROWS, file < FILE) == (True, True)
