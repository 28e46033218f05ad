"""Learned embeddings in ComfyUI: active during a merge, and usable afterwards."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from kit import merge_on
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
CALLED = {"toy-a": "embedding:toy-a", "toy-b": "embedding:toy-b"}


def module(pack: ModuleType, name: str) -> Any:
    return importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture
def folders(tmp_path: Path, library: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """models/loras and models/embeddings of their own."""
    import folder_paths

    for name in ("loras", "embeddings"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path / kind)])
    return tmp_path


@pytest.fixture
def with_embedding(kit: Any, folders: Path) -> Any:
    """A thin LoRA with an embedding beside it; the concept's trigger is given."""
    file = folders / "loras" / "toy.safetensors"
    file.write_bytes((kit.loras / "a.safetensors").read_bytes())
    vectors = torch.randn(2, 768, generator=torch.Generator().manual_seed(0))
    save_file({"clip_l": vectors}, folders / "loras" / "toy_emb.safetensors")
    return lambda trigger, **more: kit.specs.make_spec(
        file, trigger=trigger, class_word="cat", **more
    )


def merged(kit: Any, *specs: Any) -> Any:
    calibration = kit.core.Calibration(
        samples=2, timesteps=1, denoising_steps=2, latents="noise", latent_size=8
    )
    return merge_on(kit.merging, kit.model, kit.clip, list(specs), "iteris", {}, calibration)


def encoded(clip: Any, prompt: str) -> torch.Tensor:
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0].clone()


def test_in_force_is_what_a_file_in_embeddings_is(
    kit: Any, folders: Path, with_embedding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit the same merge, whether the LoRA brings it or ComfyUI finds it."""
    vectors = load_file(folders / "loras" / "toy_emb.safetensors")
    save_file(vectors, folders / "embeddings" / "other.safetensors")
    own = [str(folders / "embeddings")]
    monkeypatch.setattr(kit.clip.tokenizer.clip_l, "embedding_directory", own)
    tokenizer, before = kit.clip.tokenizer, kit.outputs()
    found = merged(kit, with_embedding("<s0><s1>"))
    assert "'<s0><s1>' calls for its embedding toy" in found.report.summary()
    wanted = merged(kit, with_embedding("embedding:other"))
    assert "its embedding toy is NOT IN FORCE" in wanted.report.summary()
    for site, change in wanted.lora.sites.items():
        assert torch.equal(found.lora.sites[site].dense(), change.dense())
    assert kit.clip.tokenizer is tokenizer
    assert all(torch.equal(a, b) for a, b in zip(before, kit.outputs(), strict=True))


def test_the_merged_clip_and_the_saved_file_are_called_alike(
    kit: Any, pack: ModuleType, folders: Path, with_embedding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.sd
    import comfy.utils

    result = merged(kit, with_embedding("<toy>"))
    lora = kit.merging.as_lora_model(result, "float32")
    files, nodes = module(pack, "nodes.lora_folders"), module(pack, "nodes.save_node")
    assert "toy: write embedding:toy;" in files.how_to_call(lora)
    _, clip = kit.lora.apply_lora(kit.model, kit.clip, lora)
    with_it = encoded(clip, "a (embedding:toy, red:1.1) cat")
    assert not torch.equal(with_it, encoded(clip, "a (red:1.1) cat"))
    save = nodes.SaveMergedLora
    monkeypatch.setattr(save, "hidden", type("Hidden", (), {"unique_id": None}), raising=False)
    taken = {"clip_l": torch.ones(1, 768)}
    (folders / "embeddings" / "my").mkdir()
    save_file(taken, folders / "embeddings" / "my" / "toy.safetensors")
    output = save.execute(lora, "my/merged")
    assert "its embedding toy: write embedding:my/toy_2" in output.ui["text"][0].lower()
    save.execute(lora, "my/merged")  # the same vectors are not written again
    assert sorted(p.name for p in folders.rglob("my/toy*")) == [
        "toy.safetensors", "toy_2.safetensors",
    ]  # fmt: skip
    assert torch.equal(
        load_file(folders / "embeddings/my/toy.safetensors")["clip_l"], taken["clip_l"]
    )
    # The stock loader reads the file, and a CLIP that has it finds the embedding on disk.
    file = folders / "loras" / output.result[0]
    tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
    _, stock = comfy.sd.load_lora_for_models(kit.model, kit.clip, tensors, 1.0, 1.0)
    monkeypatch.setattr(
        kit.clip.tokenizer.clip_l, "embedding_directory", [str(folders / "embeddings")]
    )
    found = encoded(stock, "a (embedding:my/toy_2, red:1.1) cat")
    assert torch.equal(found, with_it)
    # And it is merged again with a third.
    spec = kit.specs.make_spec(file)
    third = kit.specs.make_spec(kit.loras / "b.safetensors", trigger="zwx", class_word="dog")
    again = merged(kit, spec, third)
    assert "calls for its embedding toy" in again.report.summary()
    assert list(again.lora.embeddings) == ["toy"]


@pytest.mark.slow
def test_the_toybox_with_embeddings(
    pack: ModuleType, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`toy-a` and `toy-b` are drawn from the merged MODEL and CLIP."""
    toybox = module(pack, "toybox")
    node = module(pack, "nodes.toybox_node").IterisToybox
    merging, lora_of = module(pack, "nodes.merging"), module(pack, "nodes.comfy_lora")
    model, clip, vae, specs, _, prompts, _ = node.execute("toy-a, <toy-b>").result
    assert [prompt.split()[1] for prompt in prompts] == list(CALLED.values())
    core = module(pack, "iteris_core")
    result = merge_on(merging, model, clip, specs, "iteris", {}, core.Calibration(latent_size=8))
    lora = merging.as_lora_model(result)
    model, clip = lora_of.apply_lora(model, clip, lora)
    judge = toybox.load_judge()
    marks = {}
    for token, concept in toybox.pivotal_concepts().items():
        called = CALLED[token.strip("<>")]
        right = []
        for background in concept.backgrounds:
            prompt = f"a {called} {concept.class_word} on a {background} background"
            images = draw(model, clip, vae, prompt, 6, toybox.settings())
            right += [np.mean(a.matches(concept.thing)) for a in judge.read(images)]
        marks[token] = float(np.mean(right))
    # .84 and 1.0; in diffusers .79 and 1.0, as with both loaded into the base by hand.
    assert marks["<toy-a>"] >= 0.75
    assert marks["<toy-b>"] >= 0.95


def draw(model: Any, clip: Any, vae: Any, prompt: str, count: int, world: Any) -> list[Any]:
    import comfy.samplers
    from PIL import Image

    with torch.inference_mode():
        text, empty = (
            clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in (prompt, "")
        )
        noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        sampler = comfy.samplers.KSampler(
            model, world["steps"], model.load_device, "ddim", "ddim_uniform", 1.0,
            model.model_options,
        )  # fmt: skip
        latents = sampler.sample(
            noise, text, empty, cfg=world["guidance"], latent_image=torch.zeros_like(noise), seed=1,
            disable_pbar=True,
        )  # fmt: skip
        pixels = vae.decode(latents)
    return [Image.fromarray((p.clamp(0, 1) * 255).round().byte().cpu().numpy()) for p in pixels]
