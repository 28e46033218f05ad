"""A node's display during a merge: one bar, and previews according to the user's settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kit import Kit
from PIL import Image


@pytest.fixture
def sent(library: None) -> Iterator[list[tuple[int, int, Any]]]:
    """(value, total, picture) of every message of the progress bar."""
    import comfy.utils

    found: list[tuple[int, int, Any]] = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview=None, node_id=None: found.append((value, total, preview))
    )
    yield found
    comfy.utils.set_progress_bar_global_hook(before)


def previews(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import comfy.cli_args

    method = comfy.cli_args.LatentPreviewMethod(name)
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", method)


def test_samples_are_shown_while_they_are_denoised(
    kit: Kit, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    previews(monkeypatch, "latent2rgb")
    kit.merge()
    pictures = [picture for _, _, picture in sent if picture is not None]
    assert len(pictures) >= kit.calibration.denoising_steps
    for name, image, size in pictures:
        assert name == "JPEG"
        assert isinstance(image, Image.Image)
        assert image.size == (8, 8)
        assert size > 8
    assert len({image.tobytes() for _, image, _ in pictures}) > 1
    values = [value for value, _, _ in sent]
    assert values == sorted(values), "the bar never goes back"
    assert values[-1] > 900, "and comes to its end"
    assert len({total for _, total, _ in sent}) == 1


def test_without_previews_none_are_made(
    kit: Kit, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    previews(monkeypatch, "none")
    kit.merge()
    assert sent
    assert not any(picture for _, _, picture in sent)


def test_a_previewer_that_fails_costs_no_merge(
    kit: Kit, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import latent_preview

    def fail(*_: Any) -> None:
        raise ValueError("no such latents")

    previews(monkeypatch, "latent2rgb")
    monkeypatch.setattr(latent_preview.LatentPreviewer, "decode_latent_to_preview_image", fail)
    assert kit.merge().report.sites
    assert not any(picture for _, _, picture in sent)
