"""Every rival method against an independent source: peft's functions, or plain float64 formulas."""

import pytest
import rivals  # noqa: F401 (registers them)
import torch
from oracle import (
    SITES,
    ModuleHost,
    Net,
    captured_inputs,
    changed,
    dense_changes,
    difference,
    make_data,
    make_lora,
)
from peft.utils import merge_utils
from small_merge import EXACT

from iteris_core import Concept, SettingsError, all_methods, merge_loras
from iteris_core.linalg import least_kept

pytestmark = pytest.mark.usefixtures("unmeasured")

WIDE = 1000


def merge(loras, method, data=None, seed=0, weights=(1.0, 1.0, 1.0), **settings):
    data = data or make_data(len(loras))
    concepts = [
        Concept(lora, prompts=["unused"], weight=weight)
        for lora, weight in zip(loras, weights, strict=False)
    ]
    return merge_loras(
        ModuleHost(Net(), data), concepts, method, settings=settings, calibration={"seed": seed}
    )


LORAS = [make_lora(1, rank=2), make_lora(2, rank=3), make_lora(3, rank=2)]
DENSE = [dense_changes(lora) for lora in LORAS]


def per_site(function):
    return {site: function([dense[site] for dense in DENSE]) for site in SITES}


def test_every_method_has_a_summary():
    """Which there are is in merged_files.json."""
    assert all(len(method.summary) > 10 for method in all_methods())
    with pytest.raises(SettingsError, match=r"no method 'k-lora'.* Methods: .*ties, "):
        merge(LORAS, "k-lora")


def test_linear_ones_agree_with_peft():
    weights = torch.ones(3, dtype=torch.float64)
    total = per_site(lambda d: merge_utils.task_arithmetic(d, weights))
    assert difference(merge(LORAS, "sum").lora, total) < 1e-12
    scaled = per_site(lambda d: merge_utils.task_arithmetic(d, 0.3 * weights))
    ours = merge(LORAS, "task-arithmetic", scale=0.3)
    assert difference(ours.lora, scaled) < 1e-12


def test_svd_is_the_best_low_rank_sum():
    ours = merge(LORAS, "svd").lora
    for site in SITES:
        total = sum(dense[site] for dense in DENSE)
        u, s, vt = torch.linalg.svd(total, full_matrices=False)
        assert ours.sites[site].rank == 3
        best = (u[:, :3] * s[:3]) @ vt[:3]
        assert torch.allclose(ours.sites[site].dense(), best, atol=1e-9)


def jointly(function, parts):
    """``function`` of each LoRA's ``parts`` of all sites as one vector, by site again."""
    flat = [torch.cat([part[site].flatten() for site in SITES]) for part in parts]
    sizes = [parts[0][site].numel() for site in SITES]
    split = zip(SITES, function(flat).split(sizes), strict=True)
    return {site: merged.reshape(parts[0][site].shape) for site, merged in split}


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_ties_of_all_layers_together_agrees_with_peft(density):
    """peft's own merge of adapters trims layer by layer; TIES's authors trim all of them."""
    wanted = jointly(lambda d: merge_utils.ties(d, torch.ones(3), density), DENSE)
    ours = merge(LORAS, "ties", density=density, rank=WIDE)
    assert difference(ours.lora, wanted) < 1e-9


def test_a_lora_is_trimmed_over_the_layers_that_it_changes():
    """By the order statistic of all its entries; zeros and equal entries are entries as well."""
    generator = torch.Generator().manual_seed(0)
    sites = [
        {0: torch.randn(7, 5, generator=generator, dtype=torch.float64)},
        {0: torch.zeros(3, 4), 2: torch.full((2, 2), -0.25)},
        {0: 1e-6 * torch.randn(20, generator=generator), 2: torch.randn(9, generator=generator)},
    ]
    for density in (1e-9, 0.05, 0.3, 0.5, 0.77, 0.999):
        least = least_kept(lambda: sites, density)
        for concept, found in least.items():
            every = torch.cat([s[concept].flatten().float() for s in sites if concept in s]).abs()
            keep = max(1, int(density * len(every)))
            assert found == float(every.sort(descending=True).values[keep - 1])
    assert least_kept(lambda: sites, 1.0) == {}


def seeded_masks(monkeypatch, density):
    """Let peft draw the same masks as ours do: (concepts, out, in) per site, in order."""
    generator = torch.Generator().manual_seed(5)
    masks = []

    def bernoulli(probabilities):
        if not masks:
            shape = (3, *probabilities.shape)
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64) < density
            masks.extend(drawn.to(probabilities))
        return masks.pop(0)

    monkeypatch.setattr(merge_utils.torch, "bernoulli", bernoulli)


@pytest.mark.parametrize("name", ["dare-linear", "dare-ties"])
def test_dare_agrees_with_peft_on_the_same_masks(monkeypatch, name):
    seeded_masks(monkeypatch, 0.4)
    function = getattr(merge_utils, name.replace("-", "_"))
    wanted = per_site(lambda d: function(d, torch.ones(3), 0.4))
    ours = merge(LORAS, name, seed=5, density=0.4, rank=WIDE)
    assert difference(ours.lora, wanted) < 1e-9


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_knots_is_ties_in_the_joint_bases(density):
    ours = merge(LORAS, "knots", density=density)
    bases, parts = {}, [{} for _ in LORAS]
    for site in SITES:
        wide = torch.cat([dense[site] for dense in DENSE], dim=1)
        u, s, vt = torch.linalg.svd(wide, full_matrices=False)
        kept = min(7, len(u))
        bases[site] = u[:, :kept]
        scaled = (s[:kept, None] * vt[:kept]).split(DENSE[0][site].shape[1], dim=1)
        for part, own in zip(parts, scaled, strict=True):
            part[site] = own
    merged = jointly(lambda d: merge_utils.ties(d, torch.ones(3), density), parts)
    wanted = {site: bases[site] @ merged[site] for site in SITES}
    assert difference(ours.lora, wanted) < 1e-9


def references():
    data = make_data(3)
    return [captured_inputs(changed(Net(), dense), x) for dense, x in zip(DENSE, data, strict=True)]


@pytest.mark.parametrize("shrink", [1.0, 0.9])
def test_regmean_is_equation_four(shrink):
    weights = (1.0, 0.5, 2.0)
    ours = merge(LORAS, "regmean", weights=weights, shrink=shrink)
    inputs = references()

    def shrunk(x, weight):
        gram = weight * x.mT @ x
        return shrink * gram + (1 - shrink) * gram.diag().diag()

    wanted = {}
    for site in SITES:
        grams = [shrunk(x[site], weight) for x, weight in zip(inputs, weights, strict=True)]
        right = sum(dense[site] @ gram for dense, gram in zip(DENSE, grams, strict=True))
        wanted[site] = right @ torch.linalg.inv(sum(grams))
    assert difference(ours.lora, wanted) < 1e-4  # statistics are float32


def test_regmean_plus_plus_sees_the_merged_layers():
    ours = merge(LORAS, "regmean++", shrink=1.0)
    seen = [captured_inputs(changed(Net(), dense_changes(ours.lora)), x) for x in make_data(3)]
    for site in SITES:
        grams = [x[site].mT @ x[site] for x in seen]
        right = sum(dense[site] @ gram for dense, gram in zip(DENSE, grams, strict=True))
        wanted = right @ torch.linalg.inv(sum(grams))
        found = ours.lora.sites[site].dense()
        assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    assert difference(ours.lora, dense_changes(merge(LORAS, "regmean", shrink=1.0).lora)) > 1e-2


def test_ssr_is_its_published_router():
    ours = merge(LORAS, "ssr", ridge=1e-3)
    inputs = references()
    for site in SITES:
        downs = [lora.sites[site].down for lora in LORAS]
        stacked = torch.cat(downs)
        z = [x[site] @ stacked.mT for x in inputs]
        count = sum(map(len, z))
        gram = sum(part.mT @ part for part in z) / count
        guide = torch.cat(
            [(x[site] @ down.mT).mT @ part for x, down, part in zip(inputs, downs, z, strict=True)]
        )
        router = guide / count @ torch.linalg.inv(gram + 1e-3 * torch.eye(len(gram)))
        up = torch.cat([lora.sites[site].up for lora in LORAS], dim=1)
        wanted = up @ router @ stacked
        found = ours.lora.sites[site].dense()
        assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def test_ssr_refuses_weights():
    concepts = [Concept(lora, ["unused"], f"t{n}", weight=1.0 + n) for n, lora in enumerate(LORAS)]
    with pytest.raises(SettingsError, match="cannot weigh its LoRAs, but t1"):
        merge_loras(ModuleHost(Net(), make_data(3)), concepts, "ssr")


# What does not give a LoRA back: Custom Diffusion goes some way to it.
NOT_ITSELF = ("custom-diffusion", "iso-c", "random")


@pytest.mark.parametrize("name", [m.name for m in all_methods() if m.name not in NOT_ITSELF])
def test_one_lora_alone(name):
    """What each method makes of a single LoRA: itself, but for known scales and random drops."""
    lora = make_lora(1)
    neutral = {"task-arithmetic": {"scale": 1.0}, "ties": {"density": 1.0}}
    neutral |= {name: {"density": 1.0} for name in ("knots", "dare-linear", "dare-ties")}
    ours = merge([lora], name, **neutral.get(name, {}))
    assert difference(ours.lora, dense_changes(lora)) < 1e-3  # float32 statistics


def test_a_random_change_is_as_large_as_the_sum():
    found, whole = (dense_changes(merge(LORAS, name).lora) for name in ("random", "sum"))
    for site, change in whole.items():
        assert float(found[site].norm() / change.norm()) == pytest.approx(1, abs=1e-4)
        assert abs(float((found[site] * change).sum())) < 0.5 * float(change.norm() ** 2)


def test_chain_of_merges_is_the_plain_sweep():
    plain = {**EXACT, "ridge": 1e-5, "weighting": "none", "repair": False, "saliency": 0.0}
    plain["bound"] = 0.0
    sweep = merge(LORAS, "iteris", row_tokens="all", **{**plain, "precision": "float32"})
    ours = merge(LORAS, "chain-of-merges", ridge=1e-5)
    assert difference(ours.lora, dense_changes(sweep.lora)) < 1e-5


def test_gradients_of_the_caller_are_not_needed():
    """ComfyUI runs nodes in inference mode, where autograd keeps nothing."""
    plain = merge(LORAS, "chain-of-merges").lora
    with torch.inference_mode():
        inside = merge(LORAS, "chain-of-merges").lora
    assert difference(inside, dense_changes(plain)) < 1e-6
