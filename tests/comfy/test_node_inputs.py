"""Inputs of the merging nodes: bases without guidance, and what cannot be merged."""

from types import SimpleNamespace

import torch
from kit import part


def test_the_size_of_pictures_is_in_pixels(kit):
    """Of which a latent of SD 1.5 covers eight a side, and one of FLUX.2 sixteen."""
    from comfy.latent_formats import Flux2

    flux = SimpleNamespace(get_model_object=lambda _: Flux2())
    for model, size, wanted in ((kit.model, 64, 8), (kit.model, 500, 62), (flux, 512, 32)):
        values = {"settings": {"image_size": size}}
        request = part(kit.pack, "nodes.merge_settings").Request.of(values, model)
        assert request.config((), "iteris").calibration["latent_size"] == wanted
    request = part(kit.pack, "nodes.merge_settings").Request.of({}, kit.model)
    assert "latent_size" not in request.config((), "iteris").calibration


def test_empty_prompts(kit):
    """As the calibration says, unless the model is run without guidance."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    (speedy,) = ModelSamplingDiscrete().patch(kit.model, "lcm", False)

    def empties(model, distilled):
        host = kit.host.ComfyHost(model, kit.clip, distilled=distilled)
        lora = kit.core.lora.Lora({})
        concept = kit.core.Concept(lora, trigger="sks", class_word="cat")
        calibration = kit.core.Calibration(samples=20, latents="noise", latent_size=8)
        generator = torch.Generator().manual_seed(0)
        protocol = part(kit.pack, "iteris_core.hosts.protocol")
        request = protocol.SampleRequest([concept], calibration, None, generator, lambda *_: None)
        found = host.samples(request)
        return sum(row.prompt == "" for row in found.rows)

    assert empties(kit.model, None) > 5
    assert empties(kit.model, True) == empties(speedy, None) == 0
    assert empties(speedy, False) > 5
