"""Learned embeddings in ComfyUI: active during a merge, and usable afterwards."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from kit import Kit, part, use_folders
from reduced_models.texts import FULL_CLIP
from safetensors.torch import load_file, save_file

WIDTH = 768
"""Of SD 1.5's text encoder, which its tokenizer asks of embeddings."""


@pytest.fixture
def kit(pack, tmp_path):
    return Kit(pack, tmp_path, widths=FULL_CLIP)


@pytest.fixture
def with_embedding(kit, monkeypatch):
    """A LoRA with an embedding beside it; the concept's trigger is given."""
    use_folders(monkeypatch, kit.folder, "loras", "embeddings")
    own = [str(kit.folder / "embeddings")]
    monkeypatch.setattr(kit.clip.tokenizer.clip_l, "embedding_directory", own)
    shutil.copy(kit.loras / "a.safetensors", kit.loras / "toy.safetensors")
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    save_file({"clip_l": vectors}, kit.loras / "toy_emb.safetensors")
    save_file({"clip_l": vectors}, kit.folder / "embeddings" / "other.safetensors")
    return lambda trigger: kit.specs.make_spec(
        kit.loras / "toy.safetensors", trigger=trigger, class_word="cat"
    )


def merged(kit, *specs):
    kit.calibration = kit.core.Calibration(
        samples=2, timesteps=1, denoising_steps=2, latents="noise", latent_size=8
    )
    return kit.merge(concepts=specs)


def encoded(clip, prompt):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0].clone()


def test_in_force_is_what_a_file_in_embeddings_is(kit, with_embedding, monkeypatch):
    """Bit by bit the same merge, whether the LoRA brings it or ComfyUI finds it. Noise comes from
    the words, which differ here."""
    monkeypatch.setattr(
        part(kit.pack, "iteris_core.hosts.rows"), "zlib", SimpleNamespace(crc32=lambda _: 0)
    )
    tokenizer, before = kit.clip.tokenizer, kit.outputs()
    found = merged(kit, with_embedding("<toy>"))
    assert "its embedding toy is active" in found.report.summary()
    wanted = merged(kit, with_embedding("embedding:other"))
    assert "its embedding toy is not active" in wanted.report.summary()
    for site, change in wanted.lora.sites.items():
        assert torch.equal(found.lora.sites[site].dense(), change.dense())
    assert kit.clip.tokenizer is tokenizer
    assert kit.unchanged(before)
    assert "toy is not active" in merged(kit, with_embedding("embedding:no")).report.summary()


def test_the_merged_clip_and_the_saved_file_are_called_alike(kit, with_embedding):
    lora = kit.lora_model(merged(kit, with_embedding("<toy>")), "float32")
    assert "toy: write embedding:toy;" in part(kit.pack, "nodes.save_node").how_to_call(lora)
    _, clip = kit.lora.apply_lora(kit.model, kit.clip, lora)
    with_it = encoded(clip, "a (embedding:toy, red:1.1) cat")
    assert not torch.equal(with_it, encoded(clip, "a (red:1.1) cat"))
    folder = kit.folder / "embeddings" / "my"
    folder.mkdir()
    taken = {"clip_l": torch.ones(1, WIDTH)}
    save_file(taken, folder / "toy.safetensors")
    save = kit.node("save_node", "SaveMergedLora").execute
    output = save(lora, "my/merged")
    assert "its embedding toy: write embedding:my/toy_2" in output.ui["text"][0].lower()
    save(lora, "my/merged")  # the same vectors are not written again
    written = sorted(file.name for file in folder.iterdir())
    assert written == ["toy.safetensors", "toy_2.safetensors"]
    assert torch.equal(load_file(folder / "toy.safetensors")["clip_l"], taken["clip_l"])
    # The stock loader reads the file, and a CLIP that has it finds the embedding on disk.
    _, stock = kit.stock(output.result[0])
    assert torch.equal(encoded(stock, "a (embedding:my/toy_2, red:1.1) cat"), with_it)
    # And it is merged again with a third.
    again = merged(kit, kit.specs.make_spec(kit.loras / output.result[0]), kit.concepts()[1])
    assert "its embedding toy is active" in again.report.summary()
    assert list(again.lora.embeddings) == ["toy"]
