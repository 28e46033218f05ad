"""``make demo`` from end to end: files in, one file out, pictures of it from plain diffusers."""

import json
import re

import pytest
from PIL import Image
from safetensors.torch import load_file

from iteris_core import cli


@pytest.mark.slow
def test_demo_writes_everything_and_iteris_leads(tmp_path, monkeypatch, capsys):
    others = {tmp_path / name: name for name in ("cat.safetensors", "cat.md", "unfinished.part")}
    for path, text in others.items():
        path.write_text(text)
    monkeypatch.setattr("sys.argv", ["iteris", "demo", "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert {path: path.read_text() for path in others} == others
    scores = json.loads((tmp_path / "scores.json").read_text())
    methods = scores["methods"]
    assert set(methods) == {"iteris", "average", "sum", "single", "base"}
    for row in methods.values():
        assert all(0 <= row[name] <= 1 for name in ("image", "text", "judge"))
    for rival in ("average", "sum", "base"):
        for name in ("image", "judge"):
            assert methods["iteris"][name] > methods[rival][name]
    for size in (2, 4):
        tensors = load_file(tmp_path / f"merged-{size}.safetensors")
        ranks = {t.shape[0] for k, t in tensors.items() if k.endswith("lora_down.weight")}
        assert ranks == {8 * size}
    assert Image.open(tmp_path / "sheet.png").size[0] > 1000
    page = (tmp_path / "index.html").read_text()
    # Six rows over 7 and 14 prompts; of two concepts there is no reference and no LoRA alone.
    assert page.count("<img alt=") == 7 * 6 - 1 * 2 + 14 * 6 - 2 * 2
    assert not re.search(r"(src|href)=.https?:", page)
    assert "iteris" in capsys.readouterr().out
