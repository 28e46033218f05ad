"""What the page of architectures promises is what the tests have measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from architecture_page import page
from architecture_results import FILE

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
LIMITS = {"alone": 1e-3, "rows": 5e-3, "file": 1e-3}
FOUND = json.loads(FILE.read_text(encoding="utf-8"))


def test_the_page_is_made_from_the_figures():
    assert PAGE.read_text(encoding="utf-8") == page(FOUND)


@pytest.mark.parametrize("application", ["comfyui", "diffusers"])
def test_every_figure_keeps_its_law(application):
    for name, figures in FOUND[application].items():
        for law, limit in LIMITS.items():
            assert figures[law] < limit, (name, law)


def test_every_kind_of_lora_is_read_as_others_read_it():
    assert {"oft", "boft", "glora", "dora"} <= FOUND["kinds"].keys()
    for kind, errors in FOUND["kinds"].items():
        assert max(errors.values()) < 1e-5, kind
