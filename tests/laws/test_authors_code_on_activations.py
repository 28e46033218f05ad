"""Rivals that look at activations, against the code that their authors publish, on the same nets.

Each test is skipped without a checkout, see :mod:`published`.
"""

import copy
import importlib.util
import logging
import math
import re
import sys
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import cast

import numpy
import pytest
import torch
from oracle import SITES, Net, changed, dense_changes, make_data
from published import LINEAR, checkout, needs, off, quiet, taken
from rivals.custom_diffusion import _constrained
from test_methods import DENSE, LORAS, WIDE, merge, references
from test_own_blocks import Blocks, random_loras
from test_own_blocks import merge as merge_blocks
from torch import nn
from torch.nn import functional as F

from iteris_core.lora import SiteChanges


def weight_of(site):
    return Net().get_submodule(site).weight.detach().flatten(1)


def examples(site):
    """(inputs, outputs without the bias) of each LoRA's own model"""
    inputs = [x[site] for x in references()]
    return [(x, x @ (weight_of(site) + d[site]).mT) for x, d in zip(inputs, DENSE, strict=True)]


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
@pytest.mark.parametrize(
    ("layers", "method"), [(1, "regmean++"), *((n, "regmean++-blocks") for n in (1, 2, 3))]
)
def test_regmean_plus_plus(monkeypatch, layers, method):
    """Theirs merges a block at a time: within one, a layer's inputs are those of each LoRA's own
    block on what the merged blocks before give. Layer by layer it is another method, unless a block
    has one layer."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(concatenate_datasets=None))
    base, data = Blocks(layers), make_data(3)
    loras = random_loras(base)
    tuned = {i: changed(base, dense_changes(lora)) for i, lora in enumerate(loras)}
    wanted = regmean_plus_plus(Models(base=base, tuned=tuned, data=data), 0.9)
    settings = {"shrink": 0.9, "weighting": "tokens"}
    ours = merge_blocks(base, loras, data, method, **settings)
    assert off(ours, wanted) < 1e-5
    assert (
        layers == 1 or off(merge_blocks(base, loras, data, "regmean++", **settings), wanted) > 0.5
    )


@needs("Mix-of-Show/gradient_fusion.py")
@pytest.mark.parametrize("steps", [5, 50])
def test_gradient_fusion(steps):
    """How a layer is fitted. Rounding grows with the steps: our moments are float32."""
    code = taken(
        "Mix-of-Show/gradient_fusion.py", "chunk_compute_mse", "update_quasi_newton",
        torch=torch, F=F, optim=torch.optim, np=SimpleNamespace(Inf=math.inf), logging=logging,
    )  # fmt: skip
    wanted = {}
    for site in SITES:
        inputs, outputs = (torch.cat(some) for some in zip(*examples(site), strict=True))
        found = code["update_quasi_newton"](inputs, outputs, weight_of(site), steps, "cpu")
        wanted[site] = (found - weight_of(site)).detach()
    ours = merge(LORAS, "gradient-fusion", steps=steps)
    assert off(ours, wanted) < (1e-5 if steps == 5 else 2e-3)


@needs("LoRACLR/weight_fusion.py")
@pytest.mark.parametrize("margin", [0.5, 80.0])
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp", "ignore:.*CUDA is not available")
def test_loraclr(margin):
    code = taken(
        "LoRACLR/weight_fusion.py", "update_contrastive", torch=torch, F=F, logging=logging
    )
    config = {"lr": 1e-2, "margin": margin, "lambda_con": 1.0, "lambda_mse": 0.1}
    config["lambda_reg"] = 0.05
    wanted = {}
    for site in SITES:
        found = code["update_contrastive"](examples(site), weight_of(site), 60, "cpu", config)
        wanted[site] = found - weight_of(site)
    settings = {"rate": 1e-2, "margin": margin, "contrast": 1.0, "error": 0.1, "size": 0.05}
    assert off(merge(LORAS, "loraclr", steps=60, rank=WIDE, **settings), wanted) < 1e-4


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
