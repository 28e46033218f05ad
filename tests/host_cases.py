"""Cases for the suite over all hosts: tiny diffusers pipelines and transformers models."""

import copy
import functools

import torch
from bases import make_sdxl, tiny
from language_bases import MAKERS, make_batches
from tiny import random_lora

from iteris_core import Calibration, Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.diffusers_lora import base_of
from iteris_core.hosts.transformers import TransformersHost

CALIBRATION = Calibration(samples=3, timesteps=2, denoising_steps=3, latent_size=8, seed=3)
PROMPTS = ["a dog", "a red dog", "s1 dog in"]
DENOISER = {"sd1": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}


@functools.cache
def _pipeline(kind: str):
    """SDXL with fewer blocks than :func:`bases.tiny` has, whose layouts need them."""
    torch.manual_seed(0)
    return make_sdxl(layers=1) if kind == "sdxl" else tiny(kind)


class DiffusersCase:
    """A pipeline; LoRAs on attention, feed-forward and modulation of every component."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        self.kind = kind
        self.pipeline = copy.deepcopy(_pipeline(kind))
        for model in self.models():
            model.to(dtype)
        self.host = DiffusersHost(self.pipeline)
        # transformers sets hooks of its own for hidden states when they are first asked for.
        self.host._loop.first_call(["a"], {})

    def models(self):
        parts = self.pipeline.components.values()
        return [part for part in parts if isinstance(part, torch.nn.Module)]

    @property
    def last(self):
        """The module whose output is the model's."""
        return getattr(self.pipeline, DENOISER[self.kind])

    def concept(self, lora: Lora, seed: int = 1) -> Concept:
        return Concept(lora, prompts=PROMPTS, trigger=f"s{seed}")

    def lora(self, seed: int, select=None) -> Lora:
        lora = random_lora(self.host, seed, 3, select or self.some, 0.4)
        return Lora(lora.sites, lora.name, base=base_of(self.pipeline, self.host.sites()))

    @staticmethod
    def some(site: str) -> bool:
        parts = ("to_q", "to_v", "to_out.0", "add_k", ".ff.net.2", "proj_mlp", "v_proj", "out_proj")
        more = ("SelfAttention.v", "DenseReluDense.wo", ".norm1.linear", ".proj_out")
        if site == "transformer.proj_out":  # its rank is bound by its few outputs
            return False
        return any(part in site for part in (*parts, *more))


class TransformersCase:
    """A model of transformers; LoRAs on what its kind is usually trained on."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.model, self.targets = MAKERS[kind]()
        self.host = TransformersHost(self.model.to(dtype).eval())
        self.outputs()  # sets the hooks for hidden states that transformers keeps

    def models(self):
        return [self.model]

    @property
    def last(self):
        return self.model

    def concept(self, lora: Lora, seed: int = 1) -> Concept:
        return Concept(lora, trigger=f"s{seed}", inputs=make_batches(self.kind, seed))

    def lora(self, seed: int, select=None) -> Lora:
        return random_lora(self.host, seed, 3, select or self.some, 0.4)

    def some(self, site: str) -> bool:
        return site.rpartition(".")[2] in self.targets

    @torch.no_grad()
    def outputs(self, model=None) -> torch.Tensor:
        model = model or self.model
        batch = make_batches(self.kind, 9)[1]
        return model(
            **{k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
        ).logits


PIPELINES = ["sd1", "sdxl", "sd3", "flux"]
CASES = [*PIPELINES, *MAKERS]


def make_case(name: str, dtype: torch.dtype = torch.float32):
    return (TransformersCase if name in MAKERS else DiffusersCase)(name, dtype)


def two_concepts(case, select=None) -> list[Concept]:
    return [case.concept(case.lora(seed, select), seed) for seed in (1, 2)]
