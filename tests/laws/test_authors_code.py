"""Rivals that look at weights, against the code that their authors publish, on the same changes.

Each test is skipped without a checkout, see :mod:`published`.
"""

import copy
import logging
import math
from collections import OrderedDict, defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from oracle import SITES, Net, dense_changes, make_lora
from published import LINEAR, needs, off, quiet, taken
from test_methods import DENSE, LORAS, WIDE, merge
from torch import nn

from iteris_core import Lora

WHOLE = [make_lora(seed, rank=4) for seed in (1, 2, 3)]  # together of full rank at every site


def below(kept, of):
    """The share with which code keeps ``kept`` of ``of`` entries that keeps one more than it."""
    return (kept - 0.5) / of


def vectors(loras):
    """Task vectors"""
    return [SimpleNamespace(vector=copy.deepcopy(dense_changes(lora))) for lora in loras]


class Tuned:
    """A net with a LoRA's linear sites, as KnOTS reads it."""

    def __init__(self, model):
        self._changes = model.changes

    def get_ft_parameters(self):
        return self._changes


def by_knots(config):
    """The changes that KnOTS's code makes of :data:`LORAS`."""
    masks = taken("KnOTS/masking_ops.py", torch=torch)
    functions = taken("KnOTS/merging_functions.py", torch=torch)
    kind = taken(
        "KnOTS/task_merger.py", torch=torch, nn=nn, tqdm=quiet, deepcopy=copy.deepcopy,
        OrderedDict=OrderedDict, defaultdict=defaultdict, masked_merge=masks["masked_merge"],
        get_mask_fn=lambda name: masks[f"{name}_masking"],
        get_merging_fn=lambda name: functions[f"{name}_merging"],
    )["SVDMerger"]  # fmt: skip
    base, *nets = (Net() for _ in range(1 + len(LORAS)))
    for net, dense in zip(nets, DENSE, strict=True):
        net.changes = {f"{site}.weight": dense[site] for site in LINEAR}
    base.device, base.changes = "cpu", {name: 0 * c for name, c in nets[0].changes.items()}
    made = kind(nets, base, Tuned, device="cpu")
    made.set_scaling_coeffs(config["scaling_coeffs"])
    made.transform(config)
    found = made.merge(config)
    pairs = ((s, found.get_submodule(s).weight, Net().get_submodule(s).weight) for s in LINEAR)
    return {site: (after - before).detach() for site, after, before in pairs}


@needs("ties-merging/src/utils/merge_utils.py")
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_trims_all_layers_together(density):
    code = taken(
        "ties-merging/src/utils/merge_utils.py",
        torch=torch, copy=copy, OrderedDict=OrderedDict, logger=logging.getLogger("ties"),
    )  # fmt: skip
    flat = torch.stack([code["state_dict_to_vector"](dense) for dense in DENSE])
    share = below(int(density * flat.shape[1]), flat.shape[1])
    merged = code["merge_methods"](
        "topk", flat, reset_thresh=share, resolve_method="mass", merge_func="dis-mean"
    )
    wanted = code["vector_to_state_dict"](merged, DENSE[0])
    assert off(merge(LORAS, "ties", density=density, rank=WIDE), wanted) < 1e-9


@needs("KnOTS/task_merger.py")
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_knots_trims_all_layers_together(density):
    """Their arithmetic is float32's."""
    loras = [Lora({s: lora.sites[s] for s in LINEAR}) for lora in LORAS]
    entries = sum(7 * loras[0].sites[s].shape[1] for s in LINEAR)
    config = {
        "merge_method": "ties", "merging_type": "mean", "sign_resolve_mode": "sum_of_values",
        "topK": below(int(density * entries), entries), "scaling_coeffs": 0.5,
    }  # fmt: skip
    ours = merge(loras, "knots", density=density, scale=0.5)
    assert off(ours, by_knots(config)) < 1e-5


@needs("iso-merging/src/utils/iso.py")
def test_iso_c():
    """Of a sum of full rank: else the mean counts zeros, and arbitrary directions get it."""
    code = taken("iso-merging/src/utils/iso.py", torch=torch, math=math)
    wanted = code["iso_c"](vectors(WHOLE), SimpleNamespace(device="cpu"))
    assert off(merge(WHOLE, "iso-c", rank=WIDE), wanted) < 1e-9


@needs("compress-then-merge/task_merger.py")
def test_iso_c_of_low_rank():
    """As the first that ran it on LoRAs of one rank has it: over the directions that there are."""
    file, name = "compress-then-merge/task_merger.py", "isotropize_matrix"
    even = taken(file, name, torch=torch, float32_dtype=torch.float64)[name]
    wanted = {site: even(sum(dense[site] for dense in DENSE)) for site in SITES}
    assert off(merge(LORAS, "iso-c"), wanted) < 1e-9


@needs("ACE-Merging/src/merge/strategy.py")
@pytest.mark.parametrize(("sizes", "uneven"), [((1.0, 1.0, 1.0), False), ((0.1, 0.02, 0.2), True)])
def test_ace(sizes, uneven):
    """Where its share of directions is the same of a matrix and of the sum of ranks."""
    loras = [make_lora(seed, rank=4, size=size) for seed, size in enumerate(sizes)]
    given = [SimpleNamespace(task_vector_param_dict=dense_changes(lora)) for lora in loras]
    torch.set_default_dtype(torch.float64)
    try:
        code = taken("ACE-Merging/src/merge/strategy.py", torch=torch)
        wanted = code["MergeStrategy"](LINEAR, given, "cpu").ace_merging()
    finally:
        torch.set_default_dtype(torch.float32)
    assert off(merge(loras, "ace", rank=WIDE), wanted) < 1e-6
    assert (off(merge(loras, "ace", rank=WIDE, uneven=1e9), wanted) > 1e-2) == uneven


def drawn(monkeypatch, seed):
    """torch.bernoulli by the numbers that ours draws for the same entries."""
    generator = torch.Generator().manual_seed(seed)

    def bernoulli(chances):
        numbers = torch.rand(chances.shape, generator=generator, dtype=torch.float64)
        return (numbers >= 1 - chances).to(chances)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


@needs("MergeLM/model_merging_methods/mask_weights_utils.py")
def test_dare(monkeypatch):
    code = taken("MergeLM/model_merging_methods/mask_weights_utils.py", torch=torch, nn=nn)
    drawn(monkeypatch, 5)
    mask = partial(
        code["mask_input_with_mask_rate"], mask_rate=0.6, use_rescale=True, mask_strategy="random"
    )
    wanted = {site: sum(mask(dense[site]) for dense in DENSE) for site in SITES}
    ours = merge(LORAS, "dare-linear", seed=5, density=0.4, rank=WIDE)
    assert off(ours, wanted) < 1e-9
