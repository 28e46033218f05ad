"""Scores and their presentation."""

import re

import pytest
import torch
from PIL import Image

from iteris_core import IterisError
from iteris_core.score import ClipScorer, clip_score, contact_sheet, without_tokens
from toybox.page import html_gallery, html_page, html_table


class ColorModel(torch.nn.Module):
    """Embeds a picture as its mean colour and a word as the colour that it names."""

    def encode_image(self, images):
        return images.mean(dim=(2, 3))

    def encode_text(self, tokens):
        return tokens.float()


def scorer(batch=2):
    def preprocess(image):
        return torch.tensor(list(image.resize((1, 1)).get_flattened_data()[0])).float()[
            :, None, None
        ]

    words = {"red": [1, 0, 0], "green": [0, 1, 0], "gray": [1, 1, 1]}
    return ClipScorer(
        ColorModel(), preprocess, lambda texts: torch.tensor([words[t] for t in texts]), batch=batch
    )


RED, GREEN, GRAY = (Image.new("RGB", (8, 8), c) for c in ("#f00", "#0f0", "#888"))


def test_alignments_are_mean_cosines():
    image = scorer().image_alignment([RED, GREEN, GRAY], [RED, GREEN])
    assert image.tolist() == pytest.approx([0.5, 0.5, 3**-0.5])
    text = scorer().text_alignment([RED, GREEN, GRAY], ["red", "red", "red"])
    assert text.tolist() == pytest.approx([1.0, 0.0, 3**-0.5])
    assert clip_score(torch.tensor([0.4, -0.2])).tolist() == pytest.approx([1.0, 0.0])


def test_bad_calls_are_errors():
    with pytest.raises(IterisError, match="at least one"):
        scorer().image_alignment([], [RED])
    with pytest.raises(IterisError, match="one prompt per image"):
        scorer().text_alignment([RED], ["red", "green"])
    with pytest.raises(IterisError, match="open_clip cannot load"):
        ClipScorer.load("no-such-architecture")


def test_rare_tokens_are_taken_out_of_prompts():
    assert without_tokens("a sks1 star on a blue background", ["sks1"]) == (
        "a star on a blue background"
    )


def test_a_sheet_has_every_picture_in_its_place():
    rows = {"first": [RED, None], "second": [GREEN, Image.new("RGB", (8, 8), "#00f")]}
    sheet = contact_sheet(rows, ["a red star on a white background", "x"], cell=32, title="t")
    colors = sheet.getcolors(1 << 16)
    assert colors is not None
    counts = {color: count for count, color in colors}
    assert [counts[c] for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))] == [32 * 32] * 3


def test_the_best_of_a_column_is_marked():
    rows = {"base": [0.9, 0.9], "sum": [0.2, 0.1], "iteris": [0.5, 0.3]}
    table = html_table(["image", "seconds"], rows, apart=["base"], low=["seconds"])
    assert re.findall(r'data-value="([\d.]+)" data-best', table) == ["0.1", "0.5"]


def test_a_page_is_self_contained_and_escapes():
    table = html_table(["image"], {"<b>": [0.5], "own": [None]}, highlighted="own")
    pictures = html_gallery({"a<b": [RED, None]}, ['a "red"', "none"], "Pictures")
    page = html_page("Scores & more", [("", table), ("Pictures", pictures)])
    assert 'alt="a&lt;b: a &#34;red&#34;"' in page
    assert page.count("<img ") == 1
    assert page.count('scope="row"') == 3
    assert '<td><span class="unseen">none</span></td>' in page
    assert "&lt;b&gt;" in page
    assert "0.500" in page
    assert "Scores &amp; more" in page
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert 'name="viewport"' in page
