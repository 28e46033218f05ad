"""The pack's modules, and a reduced SD 1.5 with two LoRAs for them."""

import importlib
import json
from dataclasses import asdict
from types import SimpleNamespace

import torch

SETTINGS = {"image_size": 64, "timesteps": 2, "denoising_steps": 4}
"""What a merge node is given, for a merge in a moment."""


def part(pack, name):
    """The pack's module of this name."""
    return importlib.import_module(f"{pack.__name__}.{name}")


def node(pack, file, name):
    """A node's class, as ComfyUI runs it, with its hidden inputs set."""
    found = getattr(part(pack, f"nodes.{file}"), name)
    return type(name, (found,), {"hidden": SimpleNamespace(unique_id=None, prompt=None)})


def use_folders(monkeypatch, folder, *kinds):
    """ComfyUI in this process has its models of these ``kinds`` below ``folder``."""
    import folder_paths

    for kind in kinds:
        (folder / kind).mkdir(exist_ok=True)
        known = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(folder / kind)], known)
        )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})


def merge_on(
    merging, model, clip, concepts, method, settings, calibration, *, unmergeable="mean", **options
):
    """A merge by ``merging``, the pack's module of that name."""
    config = merging.MergeConfig(
        concepts=tuple(concepts), method=method, settings=settings,
        calibration=asdict(calibration), unmergeable=unmergeable,
    )  # fmt: skip
    return merging.merge_on(model, clip, config, **options)


class Kit:
    """A MODEL and CLIP, and the usual merge of a.safetensors and b.safetensors on them."""

    def __init__(self, pack, folder, **reduced):
        from reduced_models.unets import sd15

        self.pack, self.folder, self.loras = pack, folder, folder / "loras"
        self.core, self.merging = part(pack, "iteris_core"), part(pack, "nodes.merging")
        self.host, self.lora = part(pack, "nodes.comfy_host"), part(pack, "nodes.comfy_lora")
        self.specs = part(pack, "nodes.concept_specs")
        self.read_concept = part(pack, "iteris_core.config").read_concept
        self.model, self.clip = sd15(**reduced)
        self.loras.mkdir()
        write_loras(self.model, self.clip, self.loras)
        self.calibration = self.core.Calibration(
            samples=4, timesteps=2, denoising_steps=4, latent_size=8
        )
        self.forget()

    def node(self, file, name):
        return node(self.pack, file, name)

    def forget(self):
        """No merge and no sample is kept."""
        kept = part(self.pack, "nodes.kept")
        kept._last.clear()
        for what in ("merges", "samples"):
            kept.store(what).clear()

    def folder_of(self, what):
        """Where merges or samples are kept."""
        return part(self.pack, "nodes.kept").store(what).folder

    def request(self, **values):
        """What a merging node makes of its inputs."""
        given = {"samples": 9, "settings": SETTINGS, **values}
        return part(self.pack, "nodes.merge_settings").Request.of(given, self.model)

    def concepts(self):
        make = self.specs.make_spec
        return [
            make(self.loras / "a.safetensors", trigger="sks", class_word="cat"),
            make(self.loras / "b.safetensors", trigger="zwx", class_word="dog", strength=0.7),
        ]

    def merge(self, settings=None, **kwargs):
        on = kwargs.pop("on", (self.model, self.clip))
        concepts = kwargs.pop("concepts", None) or self.concepts()
        method = kwargs.pop("method", "iteris")
        if method == "iteris":
            settings = {"precision": "float64", **(settings or {})}
        return merge_on(
            self.merging, *on, concepts, method, settings or {}, self.calibration, **kwargs
        )

    def lora_model(self, result, dtype="float16"):
        """The merge as it leaves the merging node."""
        return self.merging.as_lora_model(self.merging.Merge.of(result), dtype)

    def stock(self, file, strength=1.0):
        """MODEL and CLIP with a file on them, by ComfyUI's own loader."""
        import comfy.sd
        import comfy.utils

        tensors = comfy.utils.load_torch_file(str(self.loras / file))
        with torch.inference_mode():
            return comfy.sd.load_lora_for_models(self.model, self.clip, tensors, strength, strength)

    def draw(self, model, clip):
        return self.outputs(model, clip)[1]

    def outputs(self, model=None, clip=None):
        """A text and a picture of MODEL and CLIP, by ComfyUI's own sampler."""
        import comfy.samplers

        model, clip = model or self.model, clip or self.clip
        with torch.inference_mode():
            text = clip.encode_from_tokens_scheduled(clip.tokenize("a (sks:1.2) cat"))
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
            sampler = comfy.samplers.KSampler(
                model, 2, model.load_device, "euler", "normal", 1.0, model.model_options
            )
            drawn = sampler.sample(
                noise, text, text, cfg=3.0, latent_image=torch.zeros_like(noise), disable_pbar=True
            )
        return text[0][0].clone(), drawn.clone()

    def unchanged(self, before):
        """Whether the model gives bit by bit what it gave ``before``, and nothing is left on it."""
        roots = (self.model.model, self.clip.cond_stage_model)
        modules = [module for root in roots for module in root.modules()]
        clean = not any(
            "encode" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in modules
        )
        return clean and all(
            torch.equal(*pair) for pair in zip(self.outputs(), before, strict=True)
        )


def write_loras(model, clip, folder, seed=1):
    """a.safetensors, b.safetensors and c.safetensors, of attention, as kohya's trainer writes them;
    the first one was trained on a folder that names its words."""
    import comfy.lora
    from reduced_models import write_lora

    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    weights = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}
    sites = {name: tuple(weights[key].shape) for name, key in keys.items() if _is_trained(name)}
    words = {"ss_dataset_dirs": json.dumps({"10_sks cat": {"n_repeats": 10}})}
    write_lora(folder / "a.safetensors", sites, seed, alpha=8.0, metadata=words)
    write_lora(folder / "b.safetensors", sites, seed + 1, alpha=4.0)
    write_lora(folder / "c.safetensors", sites, seed + 2, alpha=8.0)


def _is_trained(name):
    if name.startswith("lora_te_"):
        return "_layers_0_self_attn_" in name and name.endswith(("q_proj", "v_proj"))
    ends = ("_to_q", "_to_k", "_to_v", "_to_out_0")
    return name.startswith("lora_unet_") and "_attentions_" in name and name.endswith(ends)


def distance(found, wanted):
    """Largest relative difference of a site."""
    assert set(found.sites) == set(wanted.sites)
    pairs = [(found.sites[s].dense().double(), w.dense().double()) for s, w in wanted.sites.items()]
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
