"""Every layout on every kind of base: read in full, and equal to the library's own result."""

import copy

import layouts
import pytest
import torch
from architecture_results import record_layout
from bases import KINDS, make_lora, outputs, tiny, trained_sites
from safetensors.torch import save_file

from iteris_core import Lora
from iteris_core.hosts.diffusers_lora import pipeline_sites, read_lora


def chosen(kind: str, layout: str) -> list[str]:
    """The sites that a layout has names for."""
    sites = trained_sites(kind)
    if layout == "diffusers_oldest":
        return [s for s in sites if ".attn1.to_" in s or ".attn2.to_" in s]
    if layout == "bfl":
        return [s for s in sites if s.startswith("transformer.")]
    if layout == "xlabs":
        return [s for s in sites if s.startswith("transformer.") and (
            "attn." in s or (s.endswith("proj_out") and "single" in s))]  # fmt: skip
    if layout == "simpletuner":
        return [s for s in sites if not s.startswith("text")]
    if (kind, layout) == ("flux", "onetrainer"):  # with other sites diffusers refuses the file
        return [s for s in sites if "attn" in s]
    if layout == "diffusers_old":
        return [s for s in sites if "mlp" not in s]
    return sites


EVERYTHING = "everything"


def lost(kind: str, layout: str, alpha: float | None) -> tuple[str, str]:
    """Which output diffusers 0.42 gets wrong with such a file, and why."""
    if kind == "sd3" and layout not in ("peft", "peft_new"):
        return EVERYTHING, "no reader for SD 3 in this layout"
    if kind == "flux" and layout in ("kohya", "original", "bfl"):
        return EVERYTHING, "splits linear1 at the full model's width, which a reduced one lacks"
    if layout in ("simpletuner", "peft_raw") or (kind in ("sd1", "sdxl") and layout == "original"):
        return EVERYTHING, "does not know this layout"
    if layout == "diffusers_oldest":
        return EVERYTHING, "looks for a component in the names"
    if layout == "peft_new" and kind in ("sdxl", "sd3") and alpha is None:
        return EVERYTHING, "wants text_model where transformers has it, and finds no rank"
    if layout in ("peft", "peft_new") and kind in ("sd3", "flux"):
        return ("text_encoder_3" if kind == "sd3" else "text_encoder_2"), "drops T5"
    return "", ""


MATRIX = [
    *((kind, "kohya", alpha) for kind in KINDS for alpha in (None, 1)),
    ("sdxl", "kohya_sgm", None), ("sdxl", "kohya_sgm", 1),
    *((kind, "peft", alpha) for kind in KINDS for alpha in (None, 8)),
    *((kind, "peft_new", alpha) for kind in KINDS for alpha in (None, 8)),
    *((kind, name, None) for kind in ("sd1", "sdxl") for name in (
        "diffusers_old", "diffusers_oldest")),
    *((kind, name, alpha) for kind in KINDS for name in ("onetrainer", "simpletuner")
      for alpha in (None, 2)),
    *((kind, "original", None) for kind in KINDS),
    *((kind, "bfl", None) for kind in ("sd3", "flux")),
    *((kind, "peft_raw", None) for kind in KINDS),
    ("flux", "xlabs", None),
]  # fmt: skip


def with_changes(kind: str, lora: Lora, scale: float = 1.0):
    pipeline = copy.deepcopy(tiny(kind))
    sites = pipeline_sites(pipeline)
    for site, change in lora.sites.items():
        weight = sites[site].weight
        weight.data += scale * change.dense().reshape(weight.shape)
    return pipeline


def furthest(found, wanted) -> float:
    assert set(found) == set(wanted)
    return max(float((found[n] - w).norm() / w.norm()) for n, w in wanted.items())


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX if case[0] == "sdxl"]


@pytest.mark.parametrize(
    ("kind", "layout", "alpha"), [*(case for case in MATRIX if case[0] != "sdxl"), *SLOW]
)
def test_every_layout(kind, layout, alpha, tmp_path):
    lora = make_lora(kind, chosen(kind, layout))
    scale = 1.0 if alpha is None else alpha / 4
    tensors, metadata = getattr(layouts, layout)(lora, kind, alpha)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata=metadata)
    pipeline = copy.deepcopy(tiny(kind))
    found = read_lora(pipeline, pipeline_sites(pipeline), path)
    assert set(found.sites) == set(lora.sites)
    assert found.notes == []
    for site, change in found.sites.items():
        assert torch.allclose(change.dense(), scale * lora.sites[site].dense(), atol=1e-6), site
    truth = outputs(kind, with_changes(kind, lora, scale))
    apart = furthest(outputs(kind, with_changes(kind, found)), truth)
    assert apart < 1e-5
    assert furthest(truth, outputs(kind, tiny(kind))) > 1e-3
    try:
        pipeline.load_lora_weights(str(path))
        theirs = outputs(kind, pipeline)
    except Exception as error:
        theirs = repr(error)
    name, why = lost(kind, layout, alpha)
    record_layout(layout, kind, apart, why)
    if name == EVERYTHING:
        assert isinstance(theirs, str) or furthest(theirs, truth) > 1e-3
        return
    assert not isinstance(theirs, str), theirs
    if name:
        assert furthest({name: theirs.pop(name)}, {name: truth.pop(name)}) > 1e-3
    assert furthest(theirs, truth) < 1e-5
