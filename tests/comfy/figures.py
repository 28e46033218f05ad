"""Measurements on every architecture: a merge of one LoRA, of two, and its file."""

from dataclasses import replace

import torch
from architecture_results import drift_in
from kit import merge_on, part
from reduced_models import write_lora
from torch import nn

LONG = "a photo of a sks cat with a red hat on a wooden table beside an open window, " * 8
"""Over 77 tokens of every tokenizer."""
QUOTED = 'a sks cat with a sign that says "cat"'
PROMPTS = ("", "a sks cat", "a sks dog", "a sks hat", QUOTED, LONG)
UNREACHED = (".visual.", ".vision_model.", ".multi_modal_projector.", ".lm_head")
"""Layers of a text encoder that only pictures reach, or that make words of its states."""
BOUNDARY = 0.9
"""Of the experts' noise levels."""


class Trial:
    """One architecture's MODEL and CLIP, and two LoRAs of theirs under the names that ComfyUI has
    for every class. With two experts, also the MODEL for low noise, and two files a LoRA; those for
    high noise change the text encoder too."""

    def __init__(self, pack, reduced, folder):
        self.core, self.specs = part(pack, "iteris_core"), part(pack, "nodes.concept_specs")
        self.merging, self.lora = part(pack, "nodes.merging"), part(pack, "nodes.comfy_lora")
        self.tensors = part(pack, "iteris_core.lora_files.tensors")
        self.conds = part(pack, "nodes.comfy_conds")
        self.reduced, self.folder, self.drift = reduced, folder, ""
        self.model, self.clip = reduced.make()
        self.models = [self.model]
        self.paths = [[self.write_lora(seed)] for seed in (1, 2)]
        if reduced.experts:
            self.models.append(reduced.make()[0])
            with torch.inference_mode():
                for weight in self.models[1].model.diffusion_model.parameters():
                    weight.mul_(0.9)
            for number, files in enumerate(self.paths, 3):
                files.append(self.write_lora(number, "diffusion_model."))
        self.steps = 4 if reduced.experts else 3
        self.calibration = self.core.Calibration(
            samples=len(PROMPTS), timesteps=2, denoising_steps=self.steps, latent_size=reduced.side
        )
        self.base = *self.models, self.clip
        self.plain = self.draw(*self.base)

    def merge(self, count, rows=32, **settings):
        """Of the first ``count`` LoRAs; ``rows`` is the most in a forward. Nothing may be left
        out."""
        given = [[torch.zeros(1, 1, 1), self.reduced.entries]]
        options = {"references": self.conds.References.of(given), "unmergeable": "refuse"}
        if self.reduced.experts:
            options |= {"low": self.models[1], "boundary": BOUNDARY}
        on = self.merging, self.model, self.clip, self.concepts(count)
        settings = {**self.reduced.settings, **settings}
        return merge_on(*on, "iteris", settings, self.calibration, rows=rows, **options)

    def concepts(self, count):
        specs = [
            self.specs.make_spec(files[0], trigger="sks", class_word="cat", low=low)
            for files in self.paths[:count]
            for low in (files[1:] or [None])
        ]
        return [replace(spec, prompts=PROMPTS) for spec in specs]

    def alone(self):
        """How far a merge of one LoRA is from that LoRA, as a share of what it does."""
        found, wanted = self.draw(*self.node(self.merge(1))), self.draw(*self.stock(self.paths[0]))
        return relative(found - wanted, self.plain - wanted)

    def rows_and_file(self):
        """The largest difference of a site between merges with many and with few rows in a forward,
        and how far the saved file is from what the node gives. Without steps, whose updates have
        equal singular values: in directions without gradient they are rounding, .005 a step."""
        many, few = self.merge(2, steps=0), self.merge(2, rows=5, steps=0)
        self.drift = drift_in(many.report.notes)
        found = self.draw(*self.node(many))
        files = [self.saved(lora, f"m{i}") for i, lora in enumerate(self.loras(many))]
        saved = self.draw(*self.stock(files))
        return furthest(few, many), relative(saved - found, self.plain - found)

    def unchanged(self):
        """Whether the base draws what it drew at first, bit by bit, and nothing is left on it."""
        roots = [*(model.model for model in self.models), self.clip.cond_stage_model]
        modules = [module for root in roots for module in root.modules()]
        hooks = any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        return not hooks and torch.equal(self.draw(*self.base), self.plain)

    def loras(self, result):
        """What the merge node hands on beside its models."""
        if self.reduced.experts:
            return self.merging.as_lora_models(self.merging.Merge.of(result), "float32")
        return [self.merging.as_lora_model(self.merging.Merge.of(result), "float32")]

    def node(self, result):
        """The models and the CLIP that the merge node hands on."""
        loras = zip(self.models, self.loras(result), strict=True)
        applied = [self.lora.apply_lora(model, self.clip, lora) for model, lora in loras]
        return *(model for model, _ in applied), applied[0][1]

    def stock(self, files):
        """The models and the CLIP with these files by ComfyUI's own loader."""
        loaded = [self.loaded(*pair) for pair in zip(self.models, files, strict=True)]
        return *(model for model, _ in loaded), loaded[0][1]

    def saved(self, tensors, name):
        """As the node that saves does it."""
        path = self.folder / f"{name}.safetensors"
        self.tensors.save_atomically(dict(tensors), path, tensors.metadata)
        return path

    def loaded(self, model, path):
        import comfy.sd
        import comfy.utils

        tensors = comfy.utils.load_torch_file(str(path))
        model, clip = comfy.sd.load_lora_for_models(model, self.clip, tensors, 1.0, 1.0)
        modules = sum(key.endswith((".lora_B.weight", ".lora_up.weight")) for key in tensors)
        assert len(model.patches) + len(clip.patcher.patches) == modules
        return model, clip

    def draw(self, *parts):
        """The models in turn, as nodes KSampler (Advanced) one after the other do it."""
        import comfy.sample

        *models, clip = parts
        for model in models:
            # Keys and values that ComfyUI keeps by the text alone would be those of another LoRA.
            getattr(model.model.diffusion_model, "clear_kv_cache", lambda: None)()
        with torch.inference_mode():
            latent = self.empty()
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
            texts = self.text(clip, LONG), self.text(clip, "")
            spans = [(0, 2), (2, self.steps)] if self.reduced.experts else [(0, self.steps)]
            for model, (start, end) in zip(models, spans, strict=True):
                latent = comfy.sample.sample(
                    model, noise if start == 0 else torch.zeros_like(noise), self.steps, 2.0,
                    "euler", "simple", *texts, latent, disable_noise=start > 0, start_step=start,
                    last_step=end, force_full_denoise=end == self.steps, disable_pbar=True, seed=0,
                )  # fmt: skip
        return latent.clone()

    def text(self, clip, prompt):
        found = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        return [[states, {**own, **self.reduced.entries}] for states, own in found]

    def empty(self):
        import comfy.sample

        side = self.reduced.side
        empty = torch.zeros(self.reduced.shape or (1, 4, side, side))
        empty = comfy.sample.fix_empty_latent_channels(self.model, empty)
        return empty.repeat_interleave(3, dim=2) if self.reduced.video else empty

    def layers(self):
        """Name in a file → layer: all that are linear, of the denoiser and the text encoders."""
        roots = {
            "diffusion_model": self.model.model.diffusion_model,
            "text_encoders": self.clip.cond_stage_model,
        }
        found = {
            f"{root}.{path}": layer
            for root, module in roots.items()
            for path, layer in module.named_modules()
            if isinstance(layer, nn.Linear)
        }
        apart = (*UNREACHED, *self.reduced.apart)
        return {name: m for name, m in found.items() if not any(part in name for part in apart)}

    def write_lora(self, seed, root=""):
        """Of the layers whose names begin with ``root``."""
        sites = {n: (*m.weight.shape,) for n, m in self.layers().items() if n.startswith(root)}
        return write_lora(self.folder / f"{seed}.safetensors", sites, seed, size=0.125)


def relative(gap, whole):
    return float(gap.double().norm() / whole.double().norm())


def furthest(found, wanted):
    """The largest relative difference of a site between two merges."""
    pairs = [(found.lora.sites[s].dense(), c.dense()) for s, c in wanted.lora.sites.items()]
    return max(relative(ours - theirs, theirs) for ours, theirs in pairs)
