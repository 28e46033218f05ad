"""After a change, a new run computes only what changed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import Kit, distance
from PIL import Image
from safetensors.torch import load_file

HERE = str(Path(__file__).resolve().parents[2]).encode()
SETTINGS = {"image_size": 64, "timesteps": 2, "denoising_steps": 4}


class Desk:
    """The merging node on the thin model, and what it logs."""

    def __init__(self, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kit, self._monkeypatch = kit, monkeypatch
        self.merge_node = self.node("merge_nodes", "IterisMerge")
        self.save_node = self.node("save_node", "SaveMergedLora")
        self.module("merging").forget()
        kit.merging._RememberingHost._last = ()

    def module(self, name: str) -> Any:
        return importlib.import_module(self.kit.merging.__name__.replace("merging", name))

    def node(self, file: str, name: str) -> Any:
        found = getattr(self.module(file), name)
        hidden = type("Hidden", (), {"unique_id": None, "prompt": None})
        self._monkeypatch.setattr(found, "hidden", hidden, raising=False)
        return found

    def merge(self, concepts: Any = None, settings: Any = None, **values: Any) -> tuple[Any, ...]:
        given = {"clip": self.kit.clip, "samples": 3, "settings": {**SETTINGS, **(settings or {})}}
        specs = tuple(self.kit.concepts()) if concepts is None else concepts
        return self.merge_node.execute(self.kit.model, specs, **given, **values).result


@pytest.fixture
def desk(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(kit, monkeypatch)


def test_another_strength_does_not_merge_again(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    _, _, whole, _, _, words = desk.merge()
    _, _, half, report, _, _ = desk.merge(strength=0.5)
    assert words == "sks cat, zwx dog"
    assert caplog.text.count("IterIS: merged with") == 1
    assert distance(half.lora, scaled(whole.lora, 0.5)) < 1e-6
    assert "At strength 0.5" in report
    assert json.loads(half.metadata["iteris"])["strength"] == 0.5
    assert "strength" not in json.loads(whole.metadata["iteris"])
    # Another weight merges again, on the samples that are there.
    specs = desk.kit.concepts()
    heavy = [specs[0].model_copy(update={"weight": 3.0}), specs[1]]
    desk.merge(tuple(heavy))
    desk.merge(settings={"ridge": 0.01})
    assert caplog.text.count("IterIS: merged with") == 3
    assert caplog.text.count("IterIS: making latents") == 2  # of the fit, and held out
    desk.merge()
    assert caplog.text.count("IterIS: merged with") == 3
    other = desk.kit.model.clone()
    desk.merge_node.execute(
        other, tuple(specs), clip=desk.kit.clip, samples=3, settings=SETTINGS, method="average"
    )
    assert caplog.text.count("IterIS: merged with") == 4


def scaled(lora: Any, factor: float) -> Any:
    sites = {site: change.scaled(factor) for site, change in lora.sites.items()}
    return type(lora)(sites)


def test_cancelled_and_run_again(
    desk: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled in the sweep, the samples are kept."""
    import comfy.model_management as memory

    caplog.set_level("INFO")
    plain = desk.kit.outputs()
    seen: list[str] = []

    def stop() -> None:
        seen.append("asked")
        if len(seen) > limit[0]:
            raise memory.InterruptProcessingException

    limit = [10**9]
    with monkeypatch.context() as patched:
        patched.setattr(memory, "throw_exception_if_processing_interrupted", stop)
        desk.merge()
        limit[0] = len(seen) + 20  # in the sweep, which has 34 sites
        with pytest.raises(memory.InterruptProcessingException):
            desk.merge(settings={"ridge": 0.01})
    assert desk.kit.hooks() == 0
    assert all(torch.equal(a, b) for a, b in zip(plain, desk.kit.outputs(), strict=True))
    desk.merge(settings={"ridge": 0.01})
    assert caplog.text.count("IterIS: making latents") == 2  # of the fit, and held out


def test_cancelled_while_denoising_and_run_again(
    desk: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that were denoised are not denoised again, and the merge is the same to the bit."""
    import comfy.model_management as memory

    caplog.set_level("INFO")
    monkeypatch.setattr(desk.module("comfy_host"), "_SAMPLING_ROWS", 2)
    rows_guider = desk.kit.sampling.RowsGuider
    predict, steps = rows_guider.predict_noise, []

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        steps.append(len(args[0]))
        if len(steps) == limit[0]:
            raise memory.InterruptProcessingException
        return predict(self, *args, **options)

    limit = [0]
    monkeypatch.setattr(rows_guider, "predict_noise", counted)
    whole = desk.merge()[2]
    assert steps == [2] * 20  # three batches of four steps, and two of held-out rows
    desk.module("merging").forget()
    desk.kit.merging._RememberingHost._last = ()
    steps.clear()
    limit[0] = 7  # in the second of the batches
    with pytest.raises(memory.InterruptProcessingException):
        desk.merge()
    assert desk.kit.hooks() == 0
    again = desk.merge()[2]
    assert len(steps) == 7 + 16
    assert "making latents, 2 of them cached" in caplog.text
    assert desk.kit.merging._RememberingHost._begun is None
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())


def test_a_file_of_another_precision_with_a_thumbnail(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    folders = [tmp_path / "models" / "loras", tmp_path / "disk" / "loras"]
    known = folder_paths.folder_names_and_paths["loras"][1]
    paths = ([str(folder) for folder in folders], known)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", paths)
    lora = desk.merge()[2]
    picture = torch.rand(2, 600, 1200, 3)

    def save(name: str, **values: Any) -> dict[str, Any]:
        made = desk.save_node.execute(lora, name, **values)
        assert str(tmp_path) not in json.dumps([made.result, made.ui])
        return load_file(folders[values.get("folder") == "disk/loras"] / made.result[0])

    half = save("one", thumbnail=picture)
    single = save("one", dtype="float32")
    other = save("two", dtype="bfloat16", folder="disk/loras", rank=2)
    assert {t.dtype for k, t in half.items() if not k.endswith("alpha")} == {torch.float16}
    assert {t.dtype for k, t in other.items() if not k.endswith("alpha")} == {torch.bfloat16}
    key = next(key for key in single if key.endswith("lora_up.weight"))
    down = key.replace("lora_up", "lora_down")
    change = single[key].flatten(1) @ single[down].flatten(1)
    site = desk.kit.lora.ComfySites(desk.kit.model, desk.kit.clip).base.written
    wanted = lora.lora.sites[site[key.removesuffix(".lora_up.weight")][0].site].dense()
    assert torch.allclose(change, wanted.float(), rtol=1e-5, atol=1e-8)
    assert other[key].shape[1] == 2
    with Image.open(folders[0] / "one.preview.png") as thumbnail:
        assert thumbnail.size == (512, 256)
        assert not thumbnail.info
        assert np.asarray(thumbnail).std() > 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        text = path.read_bytes()
        assert str(tmp_path).encode() not in text
        assert HERE not in text
        assert str(desk.kit.loras).encode() not in text
    assert "one.safetensors" in folder_paths.get_filename_list("loras")
