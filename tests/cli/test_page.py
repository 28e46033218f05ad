"""The page of the demo and of the standings in a real browser. Needs chromium, and playwright-core
in NODE_PATH."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from toybox.page import html_gallery, html_page, html_table

CHROMIUM = shutil.which("chromium")
CORE = any(
    (Path(folder) / "playwright-core").is_dir()
    for folder in os.environ.get("NODE_PATH", "").split(os.pathsep)
)


@pytest.mark.skipif(not (CHROMIUM and CORE), reason="no chromium, or no playwright-core")
def test_it_is_for_phones_screen_readers_and_keyboards(tmp_path):
    figures = {"base": 0.25, "iteris": 0.75, "sum": 0.5}
    rows = {name: [SimpleNamespace(mean=value, se=0.01)] * 8 for name, value in figures.items()}
    prompts = [f"a picture of number {i}, with many words in it" for i in range(12)]
    pictures = {name: [Image.new("RGB", (512, 512), "#a40")] * len(prompts) for name in rows}
    table = html_table([f"image {i}" for i in range(1, 9)], rows)
    parts = [("", table), ("a + b", html_gallery(pictures, prompts, "Pictures"))]
    (tmp_path / "index.html").write_text(html_page("Scores", parts))
    command = ["node", str(Path(__file__).parent / "page.js"), str(tmp_path / "index.html")]
    environment = {**os.environ, "CHROMIUM": CHROMIUM or ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    looks = json.loads(done.stdout)
    assert len(looks) == 4
    for look in looks:
        assert not look["wider"]  # tables scroll by themselves
        assert not look["errors"]
        assert not look["asked"]
        assert look["pictures"] == 3 * len(prompts)
        first, second = look["orders"]
        assert first["rows"] == ["iteris", "sum", "base"]
        assert second["rows"] == ["base", "sum", "iteris"]
        assert (first["sorts"], second["sorts"]) == ("descending", "ascending")
        assert first["said"] == "Sorted by image 1, descending"
    assert len({look["background"] for look in looks}) == 2
