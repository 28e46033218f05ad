"""Steps through a denoiser that runs as its user has it: with LoRAs that are always on, embeddings,
rows of every kind, in half precision, offloaded."""

from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from gradient_check import check_gradients
from tiny import random_lora, two_concepts

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations.rows import phantoms, strength_of
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.methods import row_gradients
from iteris_core.methods.distillation import Distillation
from iteris_core.methods.row_gradients import RowGradients
from iteris_core.solve.choose import THRESHOLDS

CALIBRATION = Calibration(samples=4, timesteps=2, denoising_steps=3)


def taken(result) -> bool:
    return result.report.notes["steps"][0].endswith("taken")


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("always_on", ["outside", "include"])
def test_rows_of_every_kind_beside_a_lora_that_is_always_on(host64, monkeypatch, always_on):
    """Rows at other strengths, beside a phantom, of the base alone, of a subject in a style; with
    text encoders that are changed, and an embedding."""
    host, seen = host64, set()
    first, second = two_concepts(host)
    toy = {"toy": {"emb_params": torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}}
    first = replace(first, lora=replace(first.lora, embeddings=toy), trigger="toy")
    third = Concept(random_lora(host, 4), trigger="zwx style", kind="style")
    speed = Concept(random_lora(host, 3), trigger="fast", always_on=always_on, strength=0.5)
    of_stage = Distillation._of_stage

    def watched(self, stage, *counts):
        loads = {row.loaded for row in stage.rows}
        seen.update((strength_of(of) != 1, bool(phantoms(of))) for of in loads)
        seen.update({type(concept).__name__ for concept in self.run.job.concepts})
        seen.add(any(concept.lora is None for concept in self.run.job.concepts))
        return of_stage(self, stage, *counts)

    monkeypatch.setattr(Distillation, "_of_stage", watched)
    calibration = replace(CALIBRATION, samples=9, conditions=0.5, generic=0.3, composites=0.3)
    before = [weight.clone() for weight in host.pipeline.unet.parameters()]

    def merge(thresholds):
        thresholds = replace(thresholds, batch=60)
        how = {"settings": {"steps": 1}, "calibration": calibration, "thresholds": thresholds}
        return merge_loras(host, [first, second, third, speed], **how)

    result = check_gradients(monkeypatch, RowGradients, THRESHOLDS, merge)
    assert taken(result)
    assert seen >= {(True, False), (False, True), True, "Concept", "Composite"}
    assert "toy is active" in str(result.report.notes)
    assert all(map(torch.equal, before, host.pipeline.unet.parameters()))
    texts = [site for site in result.lora.sites if site.startswith("text_encoder")]
    plain = merge_loras(host, [first, second, third, speed], calibration=calibration).lora
    assert texts
    assert all(torch.equal(result.lora.sites[s].up, plain.sites[s].up) for s in texts)


def merged(host, **how):
    how = {"settings": {"steps": 3}, "calibration": CALIBRATION, **how}
    return merge_loras(host, two_concepts(host), **how)


def by_accelerate(host) -> None:
    for model in (host.pipeline.unet, host.pipeline.text_encoder, host.pipeline.vae):
        cpu_offload(model, torch.device("cpu"))


def by_layers(host) -> None:
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(
        host.pipeline.unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("offload", [by_accelerate, by_layers])
def test_weights_may_be_offloaded(host, pipeline, offload):
    concepts = two_concepts(host)
    plain = merged(host)
    offload(host)
    found = merge_loras(host, concepts, settings={"steps": 3}, calibration=CALIBRATION)
    assert taken(found)
    for site, change in plain.lora.sites.items():
        assert torch.equal(found.lora.sites[site].up, change.up)
    assert all(weight.requires_grad for weight in host.pipeline.unet.parameters())


def first_gradients(host, monkeypatch):
    """The gradients of the factors, and G Aᵀ A of B A: the factors may be rotated."""
    found, settled = [], RowGradients.settled

    def settle(self):
        finite = settled(self)
        ups, downs = self.leaves[::2], self.leaves[1::2]
        products = [(up.grad @ down).flatten() for up, down in zip(ups, downs, strict=True)]
        found.append(torch.cat([leaf.grad.flatten() for leaf in self.leaves]))
        found.append(torch.cat(products))
        return finite

    with monkeypatch.context() as patched:
        patched.setattr(RowGradients, "settled", settle)
        assert taken(merged(host, settings={"steps": 1, "ridge": 1e-3}))
    return found[:2]


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_half_precision_has_nearly_the_gradients_of_single(host, monkeypatch):
    """None vanishes on its way back, as those of the loss at its own size would."""
    wanted, products = first_gradients(host, monkeypatch)
    half = DiffusersHost(host.pipeline.to(torch.float16))
    found, of_half = first_gradients(half, monkeypatch)
    monkeypatch.setattr(row_gradients, "_AT_OUTPUT", 2**-22)
    small, _ = first_gradients(half, monkeypatch)
    zeros = [float((some == 0).float().mean()) for some in (wanted, found, small)]
    assert zeros[:2] == [0.0, 0.0]
    assert zeros[2] > 0.1
    assert float((of_half - products).norm() / products.norm()) < 0.15
