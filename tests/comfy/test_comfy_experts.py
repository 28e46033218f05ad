"""Models in two parts, for high and for low noise: each part only has rows from its own steps, and
two files per concept give two files."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import reduced_models
import torch
from client import Client, Graph, node
from kit import EXPERTS, merge_on
from safetensors.torch import load_file

BOUNDARY = 0.9


class Pair:
    """Both reduced experts, and files for them."""

    def __init__(self, pack: ModuleType, folder: Path) -> None:
        def module(name: str) -> Any:
            return importlib.import_module(f"{pack.__name__}.{name}")

        self.core, self.merging = module("iteris_core"), module("nodes.merging")
        self.lora, self.specs = module("nodes.comfy_lora"), module("nodes.concept_specs")
        self.sampling = module("nodes.comfy_sampling")
        self.high, self.clip = reduced_models.wan()
        self.low, _ = reduced_models.wan()
        with torch.no_grad(), torch.inference_mode():
            for weight in self.low.model.diffusion_model.parameters():
                weight.mul_(0.9)
        self.files = [
            reduced_models.write_lora(folder / f"{name}.safetensors", EXPERTS, seed)
            for seed, name in enumerate(("a_high", "a_low", "b_high", "b_low"))
        ]
        self.calibration = self.core.Calibration(
            samples=4, timesteps=2, denoising_steps=4, latent_size=8, frames=5
        )

    def concept(self, high: int, low: int | None, trigger: str) -> Any:
        return self.specs.make_spec(
            self.files[high],
            trigger=trigger,
            class_word="cat",
            low=None if low is None else self.files[low],
        )

    def merge(self, concepts: list[Any], **options: Any) -> Any:
        return merge_on(
            self.merging,
            self.high,
            self.clip,
            concepts,
            "iteris",
            {},
            self.calibration,
            **{"low": self.low, "boundary": BOUNDARY, **options},
        )

    def draw(self, high: Any, low: Any) -> torch.Tensor:
        """What two KSampler (Advanced) nodes draw, one after the other."""
        import comfy.sample

        text = self.clip.encode_from_tokens_scheduled(self.clip.tokenize("a photo of a sks cat"))
        latent = torch.zeros(1, 16, 2, 8, 8)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
        options = {"steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
        options |= {"positive": text, "negative": text, "disable_pbar": True}
        with torch.inference_mode():
            half = comfy.sample.sample(
                high, noise, latent_image=latent, last_step=2, force_full_denoise=False, **options
            )
            return comfy.sample.sample(
                low, torch.zeros_like(noise), latent_image=half, start_step=2, disable_noise=True,
                force_full_denoise=True, **options,
            ).clone()  # fmt: skip


@pytest.fixture
def pair(pack: ModuleType, tmp_path: Path) -> Pair:
    return Pair(pack, tmp_path)


def stock(pair: Pair, model: Any, file: Path) -> Any:
    import comfy.sd
    import comfy.utils

    weights = comfy.utils.load_torch_file(str(file))
    return comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0.0)[0]


def test_one_pair_alone_draws_what_the_stock_loader_draws(pair: Pair) -> None:
    result = pair.merge([pair.concept(0, 1, "sks")])
    assert {site.partition(".")[0] for site in result.lora.sites} == {"unet", "unet_2"}
    assert len(result.lora.sites) == 2 * len(EXPERTS)
    high, low = pair.merging.as_lora_models(result, "float32")
    assert len(high) == len(low)
    merged_high, _ = pair.lora.apply_lora(pair.high, pair.clip, high)
    merged_low, _ = pair.lora.apply_lora(pair.low, pair.clip, low)
    with torch.inference_mode():
        stock_high, stock_low = (
            stock(pair, model, file)
            for model, file in zip((pair.high, pair.low), pair.files[:2], strict=True)
        )
    plain = pair.draw(pair.high, pair.low)
    wanted = pair.draw(stock_high, stock_low)
    effect = float((plain - wanted).norm())
    assert effect > 1e-3 * float(plain.norm())
    assert float((pair.draw(merged_high, merged_low) - wanted).norm()) < 1e-3 * effect
    assert float((pair.draw(merged_high, stock_high) - wanted).norm()) > 0.05 * effect


def test_each_has_rows_of_its_own_steps(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the boundary the one for high noise ran, with the LoRAs for it, below it the other."""
    found: list[Any] = []
    make = pair.sampling.make_latents

    def keep(*args: Any) -> Any:
        found.append(make(*args))
        return found[-1]

    host = importlib.import_module(pair.merging.__name__.replace("merging", "comfy_host"))
    monkeypatch.setattr(host, "make_latents", keep)
    both = [pair.concept(0, 1, "sks"), pair.concept(2, 3, "zwx")]
    pair.merge(both)
    high, low = found[-2]  # the last ones are held out
    assert float(high.sigmas.min()) >= BOUNDARY > float(low.sigmas.max())
    assert high.latents.shape == low.latents.shape == (8, 2, 16, 2, 8, 8)
    assert torch.equal(torch.cat([high.schedule, low.schedule[1:]]), _schedule(pair))
    # What the second is given has passed the first under the concept's own LoRA.
    pair.merge([pair.concept(2, 1, "sks"), pair.concept(2, 3, "zwx")])
    moved = found[-2][1].latents - low.latents
    assert float(moved[:4].norm()) > 1e-3 * float(low.latents.norm())
    assert float(moved[4:].norm()) < 1e-5 * float(low.latents.norm())
    assert not any(m._forward_hooks for part in (pair.high, pair.low) for m in part.model.modules())


def _schedule(pair: Pair) -> torch.Tensor:
    import comfy.samplers

    sampling = pair.high.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, "simple", 4).float().cpu()


def test_a_concept_may_have_one_file_only(pair: Pair) -> None:
    result = pair.merge([pair.concept(0, 1, "sks"), pair.concept(2, None, "zwx")])
    assert len(result.lora.sites) == 2 * len(EXPERTS)


def test_what_does_not_fit_is_said(pair: Pair) -> None:
    with pytest.raises(pair.core.IterisError, match="the same model"):
        pair.merge([pair.concept(0, 1, "sks")], low=pair.high.clone())
    with pytest.raises(pair.core.IterisError, match="IterIS Merge Experts"):
        pair.merge([pair.concept(0, 1, "sks")], low=None)
    with pytest.raises(pair.core.IterisError, match=r"boundary 1\.5"):
        pair.merge([pair.concept(0, 1, "sks")], boundary=1.5)


def concept(name: str, trigger: str, **given: Any) -> dict[str, Any]:
    return node(
        "IterisConcept",
        lora_name=f"experts/{name}_high.safetensors",
        lora_low=f"experts/{name}_low.safetensors",
        trigger=trigger,
        **{"class_word": "cat", "strength": 1.0, "weight": 1.0},
        **{"prompts": "", "embedding": "none"},
        **given,
    )


def drawing(name: str, high: Any, low: Any, clip: Any) -> Graph:
    """Both models in turn; the node ``name`` saves the latent."""
    common = {"noise_seed": 1, "steps": 4, "cfg": 1.0, "sampler_name": "euler"}
    common |= {"scheduler": "simple", "positive": [f"{name}+", 0], "negative": [f"{name}+", 0]}
    size = {"width": 64, "height": 64, "length": 5, "batch_size": 1}
    return {
        f"{name}+": node("CLIPTextEncode", clip=clip, text="a sks cat"),
        f"{name}0": node("EmptyHunyuanLatentVideo", **size),
        f"{name}1": node(
            "KSamplerAdvanced",
            model=high,
            latent_image=[f"{name}0", 0],
            add_noise="enable",
            start_at_step=0,
            end_at_step=2,
            return_with_leftover_noise="enable",
            **common,
        ),
        f"{name}2": node(
            "KSamplerAdvanced",
            model=low,
            latent_image=[f"{name}1", 0],
            add_noise="disable",
            start_at_step=2,
            end_at_step=10000,
            return_with_leftover_noise="disable",
            **common,
        ),
        name: node("SaveLatent", samples=[f"{name}2", 0], filename_prefix=f"latents/{name}"),
    }


def drawn(models: Path, outputs: dict[str, Any], name: str) -> torch.Tensor:
    (shown,) = outputs[name]["latents"]
    return load_file(models / "output" / shown["subfolder"] / shown["filename"])["latent_tensor"]


def test_two_files_out_of_one_graph(client: Client, models: Path) -> None:
    """High and low LoRAs of two concepts in, two files out, which the stock loader draws with as
    the node's own models do."""
    pair = {"pair": node("ReducedExperts")}
    outputs = client.run({
        **pair,
        "a": concept("a", "sks"),
        "b": concept("b", "zwx", concepts=["a", 0]),
        "merge": node(
            "IterisMergeExperts",
            model=["pair", 0],
            model_low=["pair", 1],
            clip=["pair", 2],
            concepts=["b", 0],
            boundary=BOUNDARY,
            method="iteris",
            samples=3,
            settings=["settings", 0],
        ),
        "settings": node("IterisSettings", frames=5, timesteps=2, image_size=64),
        "high": node("IterisSaveLora", lora=["merge", 3], filename_prefix="iteris/high"),
        "low": node("IterisSaveLora", lora=["merge", 4], filename_prefix="iteris/low"),
        "report": node("PreviewAny", source=["merge", 5]),
        **drawing("merged", ["merge", 0], ["merge", 1], ["merge", 2]),
    })  # fmt: skip
    assert f"{2 * len(EXPERTS)} sites" in outputs["report"]["text"][0]
    names = [outputs[part]["text"][0] for part in ("high", "low")]
    files = [load_file(models / "models" / "loras" / name) for name in names]
    assert len(files[0]) == len(files[1]) == 3 * len(EXPERTS)
    assert set(files[0]) == set(files[1])
    assert not all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    loaded = {
        part: node("LoraLoaderModelOnly", model=["pair", index], lora_name=name, strength_model=1.0)
        for index, (part, name) in enumerate(zip(("high", "low"), names, strict=True))
    }
    again = client.run({
        **pair,
        **loaded,
        **drawing("loaded", ["high", 0], ["low", 0], ["pair", 2]),
        **drawing("plain", ["pair", 0], ["pair", 1], ["pair", 2]),
    })  # fmt: skip
    merged = drawn(models, outputs, "merged")
    effect = float((drawn(models, again, "plain") - merged).norm())
    assert effect > 1e-3 * float(merged.norm())
    assert float((drawn(models, again, "loaded") - merged).norm()) < 1e-3 * effect
