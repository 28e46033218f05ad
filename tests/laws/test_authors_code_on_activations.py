"""Rivals that look at activations, against the code that their authors publish, on the same nets.

Each test is skipped without a checkout, see :mod:`published`.
"""

import copy
import importlib.util
import logging
import re
import sys
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import cast

import numpy
import pytest
import torch
from oracle import ModuleHost, Net, changed, dense_changes, make_data
from published import LINEAR, checkout, needs, off, quiet, taken
from rivals.custom_diffusion import _constrained
from test_methods import DENSE, LORAS, merge
from torch import nn
from torch.nn import functional as F

from iteris_core import Concept, Lora, LowRank, merge_loras
from iteris_core.lora import SiteChanges


def weight_of(site):
    return Net().get_submodule(site).weight.detach().flatten(1)


@needs("SSR-Merge/ssr_merge/core.py")
@pytest.mark.parametrize("ridge", [1e-4, 1e-2])
def test_ssr(ridge):
    path = checkout("SSR-Merge") / "ssr_merge" / "core.py"
    spec = importlib.util.spec_from_file_location("ssr_merge_core", path)
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    pairs = [{s: (lora.sites[s].down, lora.sites[s].up) for s in LINEAR} for lora in LORAS]
    merger = core.SSRMerger(pairs, lambda_reg=ridge)
    for index, (dense, rows) in enumerate(zip(DENSE, make_data(3), strict=True)):
        model = changed(Net(), dense)
        merger.attach({site: model.get_submodule(site) for site in LINEAR})
        merger.set_active_task(index)
        with torch.no_grad():
            model(rows)
        merger.detach()
    wanted = {site: (up @ down).double() for site, (down, up) in merger.solve().items()}
    assert off(merge(LORAS, "ssr", ridge=ridge), wanted) < 1e-4


@needs("dataless-model-merging/src/model_merge/avg_merger.py")
@pytest.mark.parametrize("rows", [(6, 6, 6), (6, 4, 2)])
def test_regmean(rows):
    """Gram matrices are means over tokens, where the paper's are sums."""
    folder = "dataless-model-merging/src/model_merge"
    given = {"torch": torch, "nn": nn, "re": re, "logging": logging.getLogger("regmean")}
    given = taken(f"{folder}/misc.py", "filter_modules_by_regex", **given)
    given |= {"Conv1D": nn.Conv1d, "tqdm": quiet, "Trainer": object}
    trainer = taken(f"{folder}/local_trainer.py", "MyModelTrainer", **given)["MyModelTrainer"]
    config = SimpleNamespace(
        gram_n_example=-1, regmean_exclude_param_regex=[], regmean_diag=False,
        regmean_reduce_nondiag=0.9,
    )  # fmt: skip
    data = [x[:count] for x, count in zip(make_data(3), rows, strict=True)]
    nets = [changed(Net(), dense) for dense in DENSE]
    grams = []
    for net, x in zip(nets, data, strict=True):
        own = object.__new__(trainer)
        own.model, own._prepare_inputs = net, lambda batch: batch
        own.get_train_dataloader = lambda x=x: [{"x": x}]
        with torch.no_grad():
            found = own.compute_grams(SimpleNamespace(merger=config), SimpleNamespace(max_steps=-1))
        grams.append(found)
    merger = taken(f"{folder}/avg_merger.py", **given)["FedAvgMerger"]
    weights = {f"{s}.weight": [n.get_submodule(s).weight.detach() for n in nets] for s in LINEAR}
    merged = merger(None, config, nets, None).regmean_mean_params(weights, grams)
    wanted = {site: merged[f"{site}.weight"] - weight_of(site) for site in LINEAR}
    ours = merge(LORAS, "regmean", data, shrink=0.9, weighting="tokens")
    assert off(ours, wanted) < 1e-5


class Block(nn.Module):
    """A residual around one layer"""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x, **_):
        return (x + F.gelu(self.layer(x)),)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.double()

    def forward(self, x):
        for block in self.blocks:
            (x,) = block(x)
        return x

    def linear(self):
        return {n: m for n, m in self.named_modules() if isinstance(m, nn.Linear)}


class BlocksHost(ModuleHost):
    def sites(self):
        return self.model.linear()


def random_lora(model, generator):
    def change():
        up, down = torch.randn(2, 24, generator=generator, dtype=torch.float64)
        return LowRank(up.reshape(12, 2), down.reshape(2, 12) / 24**0.5)

    return Lora({name: change() for name in model.linear()})


class Models(SimpleNamespace):
    """The models to merge and their data, as the code for RegMean++ asks for them."""

    def named_models(self):
        return self.tuned.items()

    def load_pretrained_model(self):
        return copy.deepcopy(self.base)

    def load_train_dataset(self, name):
        return self.data[name]


class Algorithm:
    """What the code for RegMean++ inherits, and asks of a kind of model."""

    def profile(self, _):
        return nullcontext()

    def print_profile_summary(self):
        return


def regmean_plus_plus(models, shrink):
    folder = "RegMean-plusplus/fusion_bench/method/regmean_plusplus"
    given = {"torch": torch, "nn": nn, "re": re, "Tensor": torch.Tensor, "cast": cast}
    given |= {"defaultdict": defaultdict, "tqdm": quiet, "BaseModelPool": Models}
    given |= {"BaseAlgorithm": Algorithm, "SimpleProfilerMixin": object}
    given = taken(f"{folder}/regmean.py", **given)
    name = "RegMeanAlgorithmForCLIPPlusPlus"
    clip = taken(f"{folder}/clip_regmean.py", name, CLIPClassificationMixin=object, **given)[name]
    made = object.__new__(clip)
    made.config, made.exclude_param_names_regex = {}, []
    made.reduce_non_diagonal_ratio = shrink
    made.fabric = SimpleNamespace(setup=lambda layer: layer)
    made.on_regmean_start = lambda: None
    made.merge_embedding_layer = lambda models_to_merge_dict: {}
    made.get_input_for_first_layer = lambda model, data: [data]
    made.get_layers = lambda model: model.blocks
    made.update_merged_params_dict = lambda merged_params_dict, new_merged_params, layer_idx: {
        **merged_params_dict,
        **{f"blocks.{layer_idx}.{key}": value for key, value in new_merged_params.items()},
    }
    merged, base = made.run(models).linear(), models.base.linear()
    return {name: (merged[name].weight - base[name].weight).detach() for name in merged}


@needs("RegMean-plusplus/fusion_bench/method/regmean_plusplus/regmean.py")
def test_regmean_plus_plus(monkeypatch):
    """Theirs merges a block at a time, ours a layer: the same where a block has one layer."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(concatenate_datasets=None))
    base, data, generator = Blocks(), make_data(3), torch.Generator().manual_seed(1)
    loras = [random_lora(base, generator) for _ in data]
    tuned = {i: changed(base, dense_changes(lora)) for i, lora in enumerate(loras)}
    wanted = regmean_plus_plus(Models(base=base, tuned=tuned, data=data), 0.9)
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    settings = {"shrink": 0.9, "weighting": "tokens"}
    ours = merge_loras(BlocksHost(base, data), concepts, "regmean++", settings=settings)
    assert off(ours, wanted) < 1e-5


@needs("custom-diffusion/src/composenW.py")
@pytest.mark.parametrize("site", ["k", "up"])
def test_custom_diffusion(site):
    """The constrained least squares; which texts they are of is another matter."""
    code = taken(
        "custom-diffusion/src/composenW.py", "gdupdateWexact", torch=torch,
        lu_factor=lambda matrix: (matrix, None),
        lu_solve=lambda factors, right: numpy.linalg.solve(factors[0], right),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    captions = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    tokens = torch.randn(3, 2, 12, generator=generator, dtype=torch.float64)
    start = weight_of(site)
    values = [t @ (start + d[site]).mT for t, d in zip(tokens, DENSE, strict=True)]
    merged = code["gdupdateWexact"](
        captions, captions @ start.mT, tokens.flatten(0, 1), torch.cat(values), start
    )
    changes = SiteChanges(tuple(lora.sites[site] for lora in LORAS))
    ours = _constrained(changes, list(tokens), [captions], 1e-12)
    torch.testing.assert_close(ours, merged - start, rtol=1e-8, atol=1e-8)
