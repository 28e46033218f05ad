"""Rivals that look at weights, against the code that their authors publish, on the same changes.

Each test is skipped without a checkout, see :mod:`published`.
"""

import copy
import logging
import math
import time
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
    """A net with a LoRA's linear sites, as mergers that descend from KnOTS read it."""

    def __init__(self, model):
        self._parts = model.parts

    def get_ft_parameters(self):
        return {name: up @ down for name, (down, up) in self._parts.items()}

    def get_ft_ab_parameters(self):
        return self._parts


def merger(kind, config, **settings):
    """The changes that a merger of KnOTS or a descendant makes of :data:`LORAS`."""
    nets = [Net(), *(Net() for _ in LORAS)]
    for net, lora in zip(nets, [LORAS[0], *LORAS], strict=True):
        net.device = "cpu"
        net.parts = {f"{s}.weight": (lora.sites[s].down, lora.sites[s].up) for s in LINEAR}
    nets[0].parts = {name: (0 * down, up) for name, (down, up) in nets[0].parts.items()}
    made = kind(nets[1:], nets[0], Tuned, device="cpu", **settings)
    made.set_scaling_coeffs(config["scaling_coeffs"])
    made.transform(config)
    found = made.merge(config)
    pairs = ((s, found.get_submodule(s).weight, Net().get_submodule(s).weight) for s in LINEAR)
    return {site: (after - before).detach() for site, after, before in pairs}


def mergers(repository, **more):
    """Its classes, with what they import."""
    masks = taken(f"{repository}/masking_ops.py", torch=torch)
    given = {"torch": torch, "nn": nn, "chunked_sum": masks["chunked_sum"]}
    functions = taken(f"{repository}/merging_functions.py", **given)
    return taken(
        f"{repository}/task_merger.py",
        **given, tqdm=quiet, deepcopy=copy.deepcopy, partial=partial, OrderedDict=OrderedDict,
        defaultdict=defaultdict, masked_merge=masks["masked_merge"],
        get_mask_fn=lambda name: masks[f"{name}_masking"],
        get_merging_fn=lambda name: functions[f"{name}_merging"],
        ties_merging=functions["ties_merging"], **more,
    )  # fmt: skip


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
    wanted = merger(mergers("KnOTS")["SVDMerger"], config)
    assert off(merge(loras, "knots", density=density, scale=0.5), wanted) < 1e-5


@needs("core-space-merging/task_merger.py")
@pytest.mark.parametrize("isotropic", [False, True])
def test_core_space(isotropic):
    kind = mergers("core-space-merging")["MatrixPerLayerMerger"]
    config = {
        "merge_space": "core", "merge_method": "ties", "isotropize": isotropic,
        "topK": below(int(0.6 * 49), 49), "scaling_coeffs": 0.5,
    }  # fmt: skip
    settings = {"density": 0.6, "scale": 0.5, "isotropic": isotropic}
    assert off(merge(LORAS, "core-space", **settings), merger(kind, config)) < 1e-9


@needs("compress-then-merge/task_merger.py")
@pytest.mark.parametrize("beta", [0.0, 0.25])
def test_compress_then_merge(beta):
    tensorly = pytest.importorskip("tensorly")
    given = {
        "tl": tensorly, "partial_tucker": tensorly.decomposition.partial_tucker, "time": time,
        "float32_dtype": torch.float64, "COMPUTE_AVERAGE_RANK": False, "COMPUTE_FIRST_RANK": False,
    }  # fmt: skip
    kind = mergers("compress-then-merge", **given)["MatrixPerLayerMerger"]
    config = {
        "merge_space": "low_rank_core", "merge_method": "ties", "low_rank": True, "lora_rank": 2,
        "beta": beta, "topK": below(2, 4), "scaling_coeffs": 0.75,
    }  # fmt: skip
    settings = {"density": 0.5, "scale": 0.75, "own_norm": beta, "rank": 2}
    assert off(merge(LORAS, "compress-then-merge", **settings), merger(kind, config)) < 1e-5


@needs("task_singular_vectors/src/utils/TSVM_utils.py")
def test_tsv_m():
    """Of changes that have as many directions as it takes: else it fills up with arbitrary ones."""
    code = taken("task_singular_vectors/src/utils/TSVM_utils.py", torch=torch, math=math)
    config = SimpleNamespace(DATASETS="abc", device="cpu")
    wanted = code["compute_and_sum_svd_mem_reduction"](vectors(WHOLE), config)
    assert off(merge(WHOLE, "tsv-m", rank=WIDE), wanted) < 1e-9


@needs("iso-merging/src/utils/iso.py")
def test_iso_c():
    """Of a sum of full rank: else the mean counts zeros, and arbitrary directions get it."""
    code = taken("iso-merging/src/utils/iso.py", torch=torch, math=math)
    wanted = code["iso_c"](vectors(WHOLE), SimpleNamespace(device="cpu"))
    assert off(merge(WHOLE, "iso-c", rank=WIDE), wanted) < 1e-9


@needs("compress-then-merge/task_merger.py")
def test_iso_c_of_low_rank():
    """As the first that ran it on LoRAs of one rank has it: over the directions that there are."""
    even = mergers("compress-then-merge", float32_dtype=torch.float64)["isotropize_matrix"]
    wanted = {site: even(sum(dense[site] for dense in DENSE)) for site in SITES}
    assert off(merge(LORAS, "iso-c"), wanted) < 1e-9


@needs("WUDI-Merging/vit/wudi_main.py")
def test_wudi(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    code = taken("WUDI-Merging/vit/wudi_main.py", torch=torch, tqdm=quiet)
    run = code["get_redundant_task_vector"]
    wanted = {s: run(s, torch.stack([dense[s] for dense in DENSE])) for s in SITES}
    assert off(merge(LORAS, "wudi", rank=WIDE), wanted) < 1e-9


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


@needs("Pico/pico/pico.py")
def test_pico():
    """Their arithmetic is float32's."""
    code = taken("Pico/pico/pico.py", torch=torch)["PICO"]()
    wanted = {}
    for site in SITES:
        changes = [dense[site] for dense in DENSE]
        calmed = code.calibrate_layer(changes, [lora.sites[site].up for lora in LORAS])
        wanted[site] = code.compensate_energy(sum(calmed) / len(calmed), changes)
    assert off(merge(LORAS, "pico"), wanted) < 1e-5


def drawn(monkeypatch, seed, kept=True):
    """torch.bernoulli by the numbers that ours draws for the same entries."""
    generator = torch.Generator().manual_seed(seed)

    def bernoulli(chances):
        numbers = torch.rand(chances.shape, generator=generator, dtype=torch.float64)
        return ((numbers < chances) if kept else (numbers >= 1 - chances)).to(chances)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


@needs("della/mergekit/mergekit/sparsify.py")
@pytest.mark.parametrize("name", ["della", "della-linear"])
def test_della(monkeypatch, name):
    folder = "della/mergekit/mergekit"
    prune = taken(f"{folder}/sparsify.py", "rank_magnitude", torch=torch)
    tasks = f"{folder}/merge_methods/generalized_task_arithmetic.py"
    code = taken(tasks, "get_mask", torch=torch)
    drawn(monkeypatch, 7)
    wanted = {}
    for site in SITES:
        pruned = torch.stack([prune["rank_magnitude"](d[site], 0.6, True, 0.15) for d in DENSE])
        mask = code["get_mask"](pruned, "sum")
        count = mask.sum(dim=0).clamp(min=1)
        wanted[site] = (pruned * mask).sum(0) / count if name == "della" else pruned.sum(0)
    settings = {"density": 0.6, "window": 0.3, "scale": 1.0, "rank": WIDE}
    assert off(merge(LORAS, name, seed=7, **settings), wanted) < 1e-6


@needs("MergeLM/model_merging_methods/mask_weights_utils.py")
def test_dare(monkeypatch):
    code = taken("MergeLM/model_merging_methods/mask_weights_utils.py", torch=torch, nn=nn)
    drawn(monkeypatch, 5, kept=False)
    mask = partial(
        code["mask_input_with_mask_rate"], mask_rate=0.6, use_rescale=True, mask_strategy="random"
    )
    wanted = {site: sum(mask(dense[site]) for dense in DENSE) for site in SITES}
    ours = merge(LORAS, "dare-linear", seed=5, density=0.4, rank=WIDE)
    assert off(ours, wanted) < 1e-9
