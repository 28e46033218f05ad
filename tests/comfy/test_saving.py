"""Save Merged LoRA on a full disk."""

from __future__ import annotations

import importlib
import resource
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on files")
def test_a_full_disk_leaves_nothing_half_and_the_merge_is_kept(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    nodes = importlib.import_module(f"{pack.__name__}.nodes.save_node")
    errors = importlib.import_module(f"{pack.__name__}.iteris_core.errors")
    for name in ("loras", "embeddings"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path / kind)])
    save = nodes.SaveMergedLora
    monkeypatch.setattr(save, "hidden", SimpleNamespace(unique_id=None), raising=False)
    key = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{key}.lora_down.weight": torch.ones(4, 4096),
        f"{key}.lora_up.weight": torch.ones(4096, 4),
        f"{key}.alpha": torch.tensor(4.0),
    }
    lora = dict(tensors)

    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, kept[1]))
    try:
        with pytest.raises(errors.SaveError) as failed:
            save.execute(lora, "iteris/merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    said = str(failed.value)
    assert "merged.safetensors cannot be written (File too large" in said
    assert "Make room" in said
    assert said.endswith("The merge is cached; queue again to save it.")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    save.execute(lora, "iteris/merged")
    assert [p.name for p in tmp_path.rglob("*.safetensors")] == ["merged.safetensors"]

    save.execute(lora, "iteris/merged", card=True)
    card, sidecar = (
        tmp_path / "loras" / "iteris" / f"merged_2{end}" for end in (".md", ".metadata.json")
    )
    assert card.is_file()
    assert "merged_2" in sidecar.read_text()
    assert str(tmp_path) not in card.read_text() + sidecar.read_text()
