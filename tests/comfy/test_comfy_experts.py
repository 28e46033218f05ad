"""Models in two parts, for high and for low noise: each part only has rows from its own steps, and
two files per concept give two files. What they draw is with that of every architecture."""

import dataclasses

import pytest
import torch
from figures import BOUNDARY, Trial
from kit import merge_on, part
from reduced_models import ARCHITECTURES
from reduced_models.wan import SITES


class Pair(Trial):
    """The reduced experts, with merges of any files for them."""

    def merged(self, *concepts, **options):
        """Of concepts with a file for high and one for low noise, or none."""
        specs = [
            dataclasses.replace(
                self.concepts(1)[0],
                file=self.folder / f"{high}.safetensors",
                low=self.folder / f"{low}.safetensors" if low else None,
            )
            for high, low in concepts
        ]
        options = {"low": self.models[1], "boundary": BOUNDARY, **options}
        on = self.merging, self.model, self.clip, specs
        return merge_on(*on, "iteris", {}, self.calibration, **options)


@pytest.fixture
def pair(pack, tmp_path):
    from reduced_models import write_lora

    for seed, name in enumerate(("a_high", "a_low", "b_high", "b_low")):
        write_lora(tmp_path / f"{name}.safetensors", SITES, seed)
    return Pair(pack, ARCHITECTURES["Wan 2.2 14B"], tmp_path)


def test_each_has_rows_of_its_own_steps(pair, pack, monkeypatch):
    """Above the boundary the one for high noise ran, with the LoRAs for it, below it the other."""
    plain = {"conditions": 0.0, "generic": 0.0, "empty_share": 0.0}
    pair.calibration = dataclasses.replace(pair.calibration, **plain)

    host, made = part(pack, "nodes.comfy_host"), []
    make = host.comfy_samples

    def noted(*given):
        made.append(make(*given))
        return made[-1]

    monkeypatch.setattr(host, "comfy_samples", noted)

    def rows(*concepts):
        pair.merged(*concepts)
        return made[-2].noisy  # held out: the last

    high, low = rows(("a_high", "a_low"), ("b_high", "b_low"))
    assert float(high.times.min()) >= BOUNDARY > float(low.times.max())
    # What the second is given has passed the first under the concept's own LoRA.
    _, other = rows(("b_high", "a_low"), ("b_high", "b_low"))
    latents, moved = low.latents, other.latents - low.latents
    first = torch.zeros(len(latents), dtype=torch.bool)
    first[[row.latent for row in low.rows if row.concept == 0]] = True
    assert float(moved[first].norm()) > 1e-3 * float(latents.norm())
    assert float(moved[~first].norm()) < 1e-5 * float(latents.norm())


def test_a_concept_may_have_one_file_only_and_what_does_not_fit_is_said(pair):
    found = pair.merged(("a_high", "a_low"), ("b_high", "")).lora.sites
    assert {site.partition(".")[0] for site in found} == {"unet", "unet_2"}
    assert len(found) >= 2 * len(SITES)
    for options, message in (
        ({"low": pair.model.clone()}, "the same model"),
        ({"low": None}, "IterIS Merge Experts"),
        ({"boundary": 1.5}, r"boundary 1\.5"),
    ):
        with pytest.raises(pair.core.IterisError, match=message):
            pair.merged(("a_high", "a_low"), **options)
