"""Styles for the toybox's images, their reader, and the world of subjects in styles."""

from __future__ import annotations

import json

import numpy as np
import pytest
import styles
from PIL import Image
from protocol.plan import SINGLE, Variant
from styles.looks import LOOKS, PALETTE, areas
from styles.reader import STYLES

from toybox.draw import BACKGROUNDS, COLORS, Placed, Scene, Thing, draw

STAR = draw(Scene("blue", (Placed(Thing("star", "yellow", "halves", "red"), 32, 32, 20),)))


def color_at(picture: Image.Image, x: int, y: int) -> str:
    pixel = np.array(picture.getpixel((x, y)), dtype=float)
    return min(PALETTE, key=lambda name: float(np.linalg.norm(pixel - PALETTE[name])))


@pytest.mark.parametrize(
    ("style", "ground", "left", "right"),
    [
        ("negative", "yellow", "blue", "cyan"),
        ("palette", "purple", "green", "yellow"),
        ("pixel", "blue", "yellow", "red"),
        ("frame", "purple", "yellow", "red"),
        ("porthole", "cyan", "yellow", "red"),
        ("sketch", "white", "white", "white"),
    ],
)
def test_a_look_changes_areas(style, ground, left, right):
    picture = LOOKS[style](STAR)
    assert picture.size == STAR.size
    assert color_at(picture, 1, 1) == ground
    # Sketched, the line between the halves is four pixels wide.
    assert (color_at(picture, 26, 32), color_at(picture, 38, 32)) == (left, right)


def test_edges_are_no_areas():
    """Between blue and yellow lies gray, which the picture has not."""
    found = {list(PALETTE)[i] for i in np.unique(areas(STAR))}
    assert found == {"blue", "yellow", "red"}


def test_a_negative_of_a_negative_is_the_picture():
    again = LOOKS["negative"](LOOKS["negative"](STAR))
    assert np.mean(areas(again) == areas(STAR)) > 0.99


def test_exchanged_colours_are_all_different():
    """So that a thing stays apart from its background."""
    for style in ("negative", "palette"):
        plain = [Image.new("RGB", (8, 8), PALETTE[name]) for name in PALETTE]
        after = [color_at(LOOKS[style](one), 4, 4) for one in plain]
        assert sorted(after) == sorted({*COLORS, *BACKGROUNDS})


def test_styles_are_learned_and_can_be_read():
    """Of drawn pictures, and of those of each LoRA."""
    quality = json.loads((styles.ROOT / "weights" / "quality.json").read_text())
    assert set(quality["reader"]) == set(STYLES)
    assert min(of["style"] for of in quality["reader"].values()) > 0.95
    assert set(quality["read_as_theirs"]) == set(styles.styles())
    for shares in quality["read_as_theirs"].values():
        assert shares["with"] >= 0.6
        assert shares["without"] < 0.2
    assert all(style.lora.stat().st_size < 300_000 for style in styles.styles().values())


@pytest.mark.slow
def test_a_subject_in_a_style(tmp_path):
    from protocol.styles import StyledPlan, StyledRuns, StyleWorld

    world = StyleWorld()
    plan = StyledPlan(world, [Variant.parsed("sum")], [2], 1, lambda *_: {}, per_size=1)
    (pair,) = plan.sets(2, 0)
    subject, style = world.concepts(pair, 0)
    assert style.kind == "style"
    rows = {*(style.prompts or ())}
    assert len(rows) > 20
    for kind in ("styled", "subject", "style"):
        for wanted in world.prompted(kind, pair, 1):
            # A row's thing may have the colour, but no row has the background.
            background = f"on a {wanted.scene} background"
            assert background in wanted.prompt
            assert not any(background in row for row in (*rows, *world.half["templates"]))
            assert (style.trigger in wanted.prompt) == (kind != "subject")
            assert (subject.trigger in wanted.prompt) == (kind != "style")
    runs = StyledRuns(world, tmp_path / "runs.jsonl")
    alone = plan.references_of(SINGLE, pair, 0)
    merge = [trial for _, trial in plan.merges()]
    assert runs.run([*alone, *merge])
    figures = dict(runs.known[alone[0].key]["styled"])
    assert figures.keys() == {" ".join(pair)}
    for row in runs.known[merge[0].key]["styled"]:
        assert row[1]["both"] == row[1]["judge"] * row[1]["style"]
