"""Torch's modes of a forward, while other micro-batches run and sites are solved."""

import pytest
import torch
from oracle import SITES, Net, dense_changes, difference, make_data, make_lora
from small_merge import merge
from tiny import make_pipeline

from iteris_core import Calibration, Concept, IterisError, Lora, LowRank, merge_loras
from iteris_core.activations.micro_batch import Modes
from iteris_core.hosts.diffusers import DiffusersHost

pytestmark = pytest.mark.usefixtures("unmeasured")


class Autocast(Net):
    """A model that runs a part of itself under autocast, whatever its caller does."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = self.q(x), self.k(x), self.v(x)
        h = x + self.out((q.to(x) @ k.to(x).mT / 4).softmax(-1) @ v.to(x))
        with torch.autocast("cpu", torch.float16), torch.enable_grad():
            h = h + self.down(torch.nn.functional.gelu(self.up(h)).to(x)).to(x)
        return self.conv(h.reshape(h.shape[0], 3, 4, -1)).flatten(1)


def single_precision():
    loras = [make_lora(seed) for seed in (1, 2)]
    return (
        [Lora({s: c.to(torch.float32) for s, c in lora.sites.items()}) for lora in loras],
        [rows.float() for rows in make_data(2)],
    )


@pytest.mark.parametrize("objective", ["adapter", "output"])
@pytest.mark.parametrize("micro_batch", [1, 5])
def test_an_autocast_block_is_the_same_in_any_number_of_micro_batches(objective, micro_batch):
    before = Modes.now()
    settings = {"objective": objective, "ridge": 1e-3}
    whole, parts = (
        merge(*single_precision(), Autocast().float(), micro_batch=size, **settings)
        for size in (100, micro_batch)
    )
    # Processors with units for bfloat16 round by the number of rows.
    assert difference(parts.lora, dense_changes(whole.lora)) < 2e-3
    assert Modes.now() == before


def test_modes_are_the_callers_after_an_error():
    class Fails(Autocast):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                self.q(x)
                raise RuntimeError("in autocast")

    before = Modes.now()
    with pytest.raises(RuntimeError, match="in autocast"):
        merge(*single_precision(), Fails().float(), micro_batch=4)
    assert Modes.now() == before


def test_a_merge_under_autocast_is_near_the_merge_without():
    loras, data = [make_lora(1), make_lora(2)], make_data(2)
    plain = merge(loras, data, ridge=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = merge(loras, data, ridge=1e-3)
        assert torch.is_autocast_enabled("cpu")
    # float64 is left alone by autocast, and moments and solves are
    assert difference(cast.lora, dense_changes(plain.lora)) < 1e-12


def test_inference_mode_inside_a_model_is_refused_and_around_a_merge_is_not():
    class Inference(Net):
        def forward(self, x):
            with torch.inference_mode():
                return super().forward(x)

    loras, data = [make_lora(1), make_lora(2)], make_data(2)
    with pytest.raises(IterisError, match="inference mode"):
        merge(loras, data, Inference(), micro_batch=4)
    wanted = merge(loras, data)
    with torch.inference_mode():
        found = merge(loras, data, micro_batch=4)
    assert difference(found.lora, dense_changes(wanted.lora)) < 1e-9


def test_one_float32_lora_on_a_bfloat16_base_gives_itself_back():
    """Within what bfloat16 activations let through: the changes themselves are never rounded."""
    pipeline = make_pipeline()
    pipeline.unet.to(torch.bfloat16)
    pipeline.text_encoder.to(torch.bfloat16)
    host = DiffusersHost(pipeline)
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for site, module in host.sites().items():
        if site.endswith(("attn1.to_q", "attn2.to_v", "ff.net.2")):
            out, width = module.weight.shape
            up = torch.randn(out, 2, generator=generator)
            changes[site] = LowRank(up, torch.randn(2, width, generator=generator) / width**0.5)
    concept = Concept(Lora(changes, "one"), trigger="sks", class_word="cat")
    calibration = Calibration(samples=6, timesteps=2, latents="noise")
    merged = merge_loras(
        host,
        [concept],
        settings={"objective": "adapter", "micro_batch": 3},
        calibration=calibration,
    ).lora
    for site, change in changes.items():
        gap = merged.sites[site].dense() - change.dense()
        assert gap.norm() <= 1e-4 * change.dense().norm(), site
        assert merged.sites[site].up.dtype == torch.float32


class Twice(Net):
    """A layer whose weights are used twice, as ALBERT's are."""

    def forward(self, x):
        return super().forward(x + 0.1 * self.q(x))


def test_a_site_that_is_called_twice_is_refused_by_a_sweep_and_whole_in_an_iteration():
    with pytest.raises(IterisError, match=r"Site q is called more than once.*jacobi"):
        merge([make_lora(1), make_lora(2)], model=Twice())
    one = make_lora(1)
    found = merge([one], model=Twice(), schedule="jacobi", iterations=1, objective="adapter")
    assert difference(found.lora, dense_changes(one)) < 1e-8
    assert set(found.lora.sites) == set(SITES)
