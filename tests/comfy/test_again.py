"""After a change, a new run computes only what changed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from kit import SETTINGS, Kit, distance, use_folders
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture
def desk(kit: Kit, caplog: pytest.LogCaptureFixture) -> Any:
    """Runs the merging node, and counts in its log."""
    caplog.set_level("INFO")

    def merge(concepts: Any = None, on: Any = None, settings: Any = None, **values: Any) -> Any:
        given = {"clip": kit.clip, "samples": 9, "settings": {**SETTINGS, **(settings or {})}}
        specs = tuple(concepts or kit.concepts())
        run = kit.node("merge_nodes", "IterisMerge").execute
        return run(on or kit.model, specs, **given, **values).result

    merge.merges = lambda: caplog.text.count("IterIS: merged with")
    merge.latents = lambda: caplog.text.count("IterIS: making latents")
    return merge


def test_another_strength_does_not_merge_again(kit: Kit, desk: Any) -> None:
    _, _, whole, _, words = desk()
    _, _, half, report, _ = desk(strength=0.5)
    assert words == "sks cat, zwx dog"
    assert desk.merges() == 1
    sites = {site: change.scaled(0.5) for site, change in whole.lora.sites.items()}
    assert distance(half.lora, type(whole.lora)(sites)) < 1e-6
    assert "At strength 0.5" in report
    assert json.loads(half.metadata["iteris"])["strength"] == 0.5
    assert "strength" not in json.loads(whole.metadata["iteris"])
    # Another weight merges again, on the samples that are there.
    specs = kit.concepts()
    desk((specs[0].model_copy(update={"weight": 3.0}), specs[1]))
    desk(settings={"rank": 2})
    assert (desk.merges(), desk.latents()) == (3, 2)  # of the fit, and held out
    desk()
    assert desk.merges() == 3
    desk(on=kit.model.clone(), method="average")
    assert desk.merges() == 4


def test_a_run_after_one_that_was_cancelled_has_the_same_rows(
    kit: Kit, desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the merge is the same to the bit."""
    import comfy.model_management as memory

    asked, limit = [0], [0]

    def stop() -> None:
        asked[0] += 1
        if limit[0] and asked[0] > limit[0]:
            raise memory.InterruptProcessingException

    monkeypatch.setattr(memory, "throw_exception_if_processing_interrupted", stop)
    whole = desk()[2]
    limit[0], asked[0], other = asked[0] - 5, 0, kit.model.clone()
    with pytest.raises(memory.InterruptProcessingException):
        desk(on=other)
    limit[0] = 0
    found = desk(on=other)[2]
    assert all(torch.equal(tensor, found[key]) for key, tensor in whole.items())
    assert desk.latents() == 4


def test_a_file_of_another_precision_with_a_thumbnail(
    kit: Kit, desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    use_folders(monkeypatch, kit.folder, "loras")
    disk = kit.folder / "disk" / "loras"
    folder_paths.folder_names_and_paths["loras"][0].append(str(disk))
    lora, before = desk()[2], set(kit.loras.iterdir())

    def save(name: str, **values: Any) -> dict[str, Any]:
        made = kit.node("save_node", "SaveMergedLora").execute(lora, name, **values)
        assert str(kit.folder) not in json.dumps([made.result, made.ui])
        return load_file((disk if "folder" in values else kit.loras) / made.result[0])

    half = save("one", thumbnail=torch.rand(2, 600, 1200, 3))
    single = save("one", dtype="float32")
    other = save("two", dtype="bfloat16", folder="disk/loras", rank=2)
    assert {t.dtype for k, t in half.items() if not k.endswith("alpha")} == {torch.float16}
    assert {t.dtype for k, t in other.items() if not k.endswith("alpha")} == {torch.bfloat16}
    key = next(key for key in single if key.endswith("lora_up.weight"))
    down = key.replace("lora_up", "lora_down")
    change = single[key].flatten(1) @ single[down].flatten(1)
    site = kit.lora.ComfySites(kit.model, kit.clip).base.written
    wanted = lora.lora.sites[site[key.removesuffix(".lora_up.weight")][0].site].dense()
    assert torch.allclose(change, wanted.float(), rtol=1e-5, atol=1e-8)
    assert other[key].shape[1] == 2
    with Image.open(kit.loras / "one.preview.png") as thumbnail:
        assert thumbnail.size == (512, 256)
        assert not thumbnail.info
        assert np.asarray(thumbnail).std() > 1
    written = [*(set(kit.loras.iterdir()) - before), *disk.iterdir()]
    assert len(written) == 4
    assert not any(str(kit.folder).encode() in path.read_bytes() for path in written)
    assert "one.safetensors" in folder_paths.get_filename_list("loras")
