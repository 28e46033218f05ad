"""Resize LoRA and Extract LoRA on a real MODEL and CLIP, which stay as they were."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from kit import Kit, distance
from safetensors.torch import load_file, save_file

SETTINGS = {"image_size": 64, "timesteps": 2, "denoising_steps": 4}
SIZE = {"rank": 2, "megabytes": 0.0, "energy": 0.0}


class Edits:
    """Both nodes, with ``progress`` called at every step."""

    def __init__(self, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes = importlib.import_module(kit.merging.__name__.replace("merging", "edit_nodes"))
        self.progress: Any = lambda _: None
        monkeypatch.setattr(self.nodes, "NodeProgress", lambda _: lambda p: self.progress(p))
        hidden = type("Hidden", (), {"unique_id": None, "prompt": None})
        for node in (self.nodes.ResizeLora, self.nodes.ExtractLora):
            monkeypatch.setattr(node, "hidden", hidden, raising=False)

    def run(self, name: str, *args: Any, **values: Any) -> tuple[Any, Any, Any, str]:
        values = {**SIZE, "samples": 4, "settings": SETTINGS, **values}
        return getattr(self.nodes, name).execute(*args, **values).result


@pytest.fixture
def edits(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Edits:
    return Edits(kit, monkeypatch)


def on_model(kit: Kit, name: str) -> tuple[Any, Any]:
    import comfy.sd
    import comfy.utils

    tensors = comfy.utils.load_torch_file(str(kit.loras / name))
    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(kit.model, kit.clip, tensors, 1.0, 1.0)


def drawn(kit: Kit, model: Any, clip: Any) -> torch.Tensor:
    shown = Kit.__new__(Kit)
    shown.model, shown.clip = model, clip
    return shown.outputs()[1]


@pytest.mark.parametrize("by", ["outputs", "weights"])
def test_a_lora_of_a_lower_rank_than_it_says_is_resized_without_loss(
    kit: Kit, edits: Edits, by: str
) -> None:
    tensors = load_file(kit.loras / "a.safetensors")
    for key, up in tensors.items():
        if key.endswith("lora_up.weight"):
            up[:, 2:] = up[:, :2]  # of four columns two are the others again
    save_file(tensors, kit.loras / "twice.safetensors")
    spec = kit.specs.make_spec(kit.loras / "twice.safetensors", trigger="sks", class_word="cat")
    before = kit.outputs()
    model, clip, lora, report = edits.run("ResizeLora", kit.model, [spec], kit.clip, by=by)
    assert lora.lora.ranks == {2}
    assert "100.0% of its effect on their outputs kept" in report
    host = kit.host.ComfyHost(kit.model, kit.clip)
    assert distance(lora.lora, kit.read_concept(spec, host).lora) < 1e-4
    wanted = drawn(kit, *on_model(kit, "twice.safetensors"))
    plain = drawn(kit, kit.model, kit.clip)
    ours = drawn(kit, model, clip)
    assert (ours - wanted).norm() < 2e-3 * (plain - wanted).norm()
    assert all(torch.equal(a, b) for a, b in zip(kit.outputs(), before, strict=True))
    assert kit.hooks() == 0


def test_a_share_or_a_size_says_the_rank(kit: Kit, edits: Edits) -> None:
    spec = kit.concepts()[0]
    on = (kit.model, [spec], kit.clip)
    ranks = []
    for more in ({"energy": 0.6}, {"energy": 0.95}, {"megabytes": 0.4}):
        _, _, lora, _ = edits.run("ResizeLora", *on, by="weights", **{**SIZE, "rank": 0, **more})
        ranks.append(sum(change.rank for change in lora.lora.sites.values()))
        size = sum(tensor.numel() * tensor.element_size() for tensor in lora.values())
    assert ranks[0] < ranks[1]
    assert size <= 0.4e6
    for wrong in ({"rank": 2, "energy": 0.5}, {"rank": 0}):
        with pytest.raises(kit.core.IterisError, match="Set one of rank, megabytes and energy"):
            edits.run("ResizeLora", *on, **{**SIZE, **wrong})
    with pytest.raises(kit.core.IterisError, match="takes one LoRA, but 2 are connected"):
        edits.run("ResizeLora", kit.model, kit.concepts(), kit.clip)


@pytest.mark.parametrize("clips", ["one", "two"])
def test_a_lora_on_a_model_is_extracted_from_it(kit: Kit, edits: Edits, clips: str) -> None:
    """Both MODELs share one network, of which one has the LoRA on it."""
    tuned = on_model(kit, "a.safetensors")
    before, before_tuned = drawn(kit, kit.model, kit.clip), drawn(kit, *tuned)
    ours = tuned if clips == "two" else (tuned[0], None)
    model, clip, lora, report = edits.run(
        "ExtractLora", kit.model, ours[0], kit.clip, ours[1], rank=4
    )
    host = kit.host.ComfyHost(kit.model, kit.clip)
    wanted = kit.read_concept(kit.concepts()[0], host).lora
    sites = {s: c for s, c in wanted.sites.items() if clips == "two" or s.startswith("unet")}
    assert set(lora.lora.sites) == set(sites)
    for site, change in sites.items():
        gap = (lora.lora.sites[site].dense() - change.dense()).norm() / change.dense().norm()
        assert gap < 0.02, site
    assert "error 0." in report or "error 1." in report
    close = drawn(kit, model, clip if clips == "two" else kit.clip)
    target = before_tuned if clips == "two" else drawn(kit, tuned[0], kit.clip)
    assert (close - target).norm() < 0.02 * (before - target).norm()
    assert torch.equal(drawn(kit, kit.model, kit.clip), before)
    assert torch.equal(drawn(kit, *tuned), before_tuned)
    assert kit.hooks() == 0


def with_vectors(kit: Kit) -> tuple[Any, Any]:
    """A LoRA, and another change on every norm and bias, as patches of MODEL and CLIP."""
    model, clip = on_model(kit, "a.safetensors")
    generator = torch.Generator().manual_seed(3)
    for patcher in (model, clip.patcher):
        vectors = {
            key: ("diff", (0.05 * torch.randn(value.shape, generator=generator),))
            for key, value in patcher.model.state_dict().items()
            if value.ndim == 1 and key.startswith(("diffusion_model.", "clip_l.transformer."))
        }
        assert len(patcher.add_patches(vectors)) == len(vectors) > 50
    return model, clip


def weights(patcher: Any) -> dict[str, torch.Tensor]:
    """Every weight with its patches, in float32."""
    import comfy.lora

    found: dict[str, torch.Tensor] = {}
    for key in patcher.model.state_dict():
        (weight, convert), *patches = patcher.get_key_patches(key)[key]
        weight = convert(weight.detach().float().clone(), inplace=True)
        found[key] = comfy.lora.calculate_weight(patches, weight, key)
    return found


def test_norms_and_biases_are_extracted_in_full(kit: Kit, edits: Edits) -> None:
    """The file in the stock loader makes of the base what the fine-tune is, weight by weight."""
    import comfy.sd
    import comfy.utils

    tuned = with_vectors(kit)
    before = drawn(kit, kit.model, kit.clip)
    *_, lora, report = edits.run("ExtractLora", kit.model, tuned[0], kit.clip, tuned[1], rank=4)
    assert "biases and normalisations exactly" in report
    assert "no place" not in report
    assert float(report.partition("error ")[2].partition("%")[0]) < 2
    path = kit.loras / "tuned.safetensors"
    save_file(dict(lora), path)
    with torch.inference_mode():
        loaded = comfy.sd.load_lora_for_models(
            kit.model, kit.clip, comfy.utils.load_torch_file(str(path)), 1.0, 1.0
        )
    for patched, wanted, base in (
        (loaded[0], tuned[0], kit.model),
        (loaded[1].patcher, tuned[1].patcher, kit.clip.patcher),
    ):
        plain, aim = weights(base), weights(wanted)
        for key, weight in weights(patched).items():
            gap, moved = (weight - aim[key]).norm(), (plain[key] - aim[key]).norm()
            assert gap <= (0.02 if weight.ndim > 1 else 1e-3) * moved, key
    assert torch.equal(drawn(kit, kit.model, kit.clip), before)
    assert kit.hooks() == 0
    path.unlink()


def test_a_lora_on_the_text_encoder_alone_is_extracted(kit: Kit, edits: Edits) -> None:
    """No denoiser runs then, and what is compared are the texts' conditionings."""
    _, tuned = on_model(kit, "a.safetensors")
    before = kit.outputs()[0]
    *_, lora, report = edits.run("ExtractLora", kit.model, kit.model, kit.clip, tuned, rank=4)
    assert {site.partition(".")[0] for site in lora.lora.sites} == {"text_encoder"}
    assert "error 0." in report or "error 1." in report
    assert torch.equal(kit.outputs()[0], before)
    assert kit.hooks() == 0


def test_both_models_are_as_they_were_after_a_failure_and_an_interrupt(
    kit: Kit, edits: Edits
) -> None:
    import comfy.model_management

    tuned = on_model(kit, "a.safetensors")
    before = drawn(kit, kit.model, kit.clip), drawn(kit, *tuned)
    spec = kit.concepts()[0]

    def fails(error: BaseException, after: int, name: str, *args: Any) -> None:
        seen = 0

        def progress(_: Any) -> None:
            nonlocal seen
            seen += 1
            if seen > after:
                raise error

        edits.progress = progress
        with pytest.raises(type(error)):
            edits.run(name, *args)
        assert kit.hooks() == 0
        assert torch.equal(drawn(kit, kit.model, kit.clip), before[0])
        assert torch.equal(drawn(kit, *tuned), before[1])

    stop = comfy.model_management.InterruptProcessingException()
    for after in (5, 60):
        fails(stop, after, "ResizeLora", kit.model, [spec], kit.clip)
        fails(ValueError("broken"), after, "ExtractLora", kit.model, tuned[0], kit.clip, tuned[1])


def test_models_that_are_alike_or_of_two_kinds(kit: Kit, edits: Edits) -> None:
    from reduced_models import zimage

    # What nothing of SD 1.x uses, and ComfyUI leaves as the memory was.
    projection = kit.clip.cond_stage_model.clip_l.transformer.text_projection
    projection.weight.data.fill_(float("nan"))
    with pytest.raises(kit.core.IterisError, match="have the same layer weights"):
        edits.run("ExtractLora", kit.model, kit.model, kit.clip)
    with pytest.raises(kit.core.IterisError, match="have different architectures"):
        edits.run("ExtractLora", kit.model, zimage()[0], kit.clip)
