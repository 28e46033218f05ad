"""The architectures page states what the tests measured."""

import json
from pathlib import Path

import architecture_page
import layout_page
import pytest
from architecture_results import FILE

DOCS = Path(__file__).parents[2] / "docs"
LIMITS = {"alone": 1e-3, "rows": 5e-3, "file": 1e-3}
FOUND = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "page"), [("architectures", architecture_page.page), ("layouts", layout_page.page)]
)
def test_a_page_is_made_from_the_figures(name, page):
    assert (DOCS / f"{name}.md").read_text(encoding="utf-8") == page(FOUND)


@pytest.mark.parametrize("application", ["comfyui", "diffusers"])
def test_every_figure_keeps_its_law(application):
    for name, figures in FOUND[application].items():
        for law, limit in LIMITS.items():
            assert figures[law] < limit, (name, law)


def test_every_layout_is_read_in_full():
    assert FOUND["layouts"].keys() == layout_page.LAYOUTS.keys()
    for layout, bases in FOUND["layouts"].items():
        assert max(of["error"] for of in bases.values()) < 1e-5, layout


def test_every_kind_of_lora_is_read_as_others_read_it():
    assert FOUND["kinds"].keys() == layout_page.TITLES.keys()
    for kind, errors in FOUND["kinds"].items():
        assert max(errors.values()) < 1e-5, kind
