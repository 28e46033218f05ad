"""Weights by block and layers by name, against the names of the original code."""

import re

import pytest
import torch
from command_line import QUICK, make_world, recipe_of, same
from safetensors.torch import load_file

from iteris_core import IterisError, Lora, LowRank
from iteris_core.architectures import Architecture
from iteris_core.lora_files import BaseModel, released_base
from iteris_core.lora_files.blocks import LISTS, PRESETS, blocks_of, filtered, weights_by_block


def whole_lora(name):
    """A change of rank 1 and size 1 of every layer."""
    base = released_base(name)
    sites = {
        site: LowRank(torch.ones(1, 1), torch.ones(1, 1))
        for site in base.shapes
        if not site.startswith("text_encoder") or site.endswith("q_proj")
    }
    return Lora(sites, name, base=base)


def factors(lora):
    return {site: float(change.dense()[0, 0]) for site, change in lora.sites.items()}


@pytest.mark.parametrize(
    ("name", "count"), [("sd1", 17), ("sd1", 26), ("sdxl", 12), ("sdxl", 20), ("flux", 61)]
)
def test_a_weight_goes_to_the_block_that_the_original_code_calls_so(name, count):
    """Oracle: where the original name of a layer has the block's number."""
    lora = whole_lora(name)
    numbers = [i / 100 + 0.1 for i in range(count)]
    found = factors(filtered(lora, ",".join(map(str, numbers))))
    wanted = dict(zip(LISTS[count], numbers, strict=True))
    base = lora.base
    originals = base.architecture.original_names(base.shapes)
    sides = {"input": "IN", "output": "OUT", "double": "D", "single": "S"}
    checked = 0
    for original, alias in originals.items():
        parts = re.match(r"(\w+?)_blocks?\.(\d+)", original)
        block = None
        if parts is not None:
            middle = parts[1] == "middle"
            block = "M00" if middle else f"{sides[parts[1]]}{int(parts[2]):02}"
        elif name == "flux":
            block = "OUT" if original.startswith("final_layer") else "IN"
        for piece in alias:
            expected = 1.0 if block is None else wanted.get(block, 0.0)
            assert found.get(piece.site, 0.0) == pytest.approx(expected), (original, block)
            checked += 1
    assert checked > 200
    texts = {site.partition(".")[0]: f for site, f in found.items() if "text_encoder" in site}
    first = ("CLIP", "T5") if name == "flux" else ("BASE", "BASE")
    assert texts == {
        f"text_encoder{end}": pytest.approx(wanted[block])
        for end, block in zip(("", "_2"), first, strict=True)
        if f"text_encoder{end}" in texts
    }


def test_the_short_lists_have_every_layer_of_attention():
    for name, count in (("sd1", 17), ("sdxl", 12)):
        places = blocks_of(released_base(name))
        attention = {block for site, block in places.items() if ".attn1." in site}
        assert attention == set(LISTS[count]) - {"BASE"}
    assert all(len(text.split(",")) == 17 for text in PRESETS.values())
    kept = {block for block, weight in weights_by_block("OUTS").items() if weight}
    assert kept == {"BASE", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"}


def test_sites_that_have_the_original_names_are_in_the_same_blocks():
    """As in ComfyUI, where no table of names is needed."""
    base = released_base("flux")
    originals = base.architecture.original_names(base.shapes)
    shapes = {f"unet.{name}": (1, 1) for name in originals}
    texts = {site: shape for site, shape in base.shapes.items() if site.startswith("text_encoder")}
    kind = Architecture("comfyui", "Flux", denoiser="unet")
    found, wanted = blocks_of(BaseModel(kind, shapes | texts, {}, {})), blocks_of(base)
    assert {name: found.get(f"unet.{name}") for name in originals} == {
        name: wanted.get(alias[0].site) for name, alias in originals.items()
    }
    assert set(found.values()) == set(LISTS[61])
    larger = BaseModel(kind, {**shapes, "unet.double_blocks.19.img_mlp.0": (1, 1)}, {}, {})
    lora = Lora({min(shapes): LowRank(torch.ones(1, 1), torch.ones(1, 1))}, base=larger)
    with pytest.raises(IterisError, match="Flux has no blocks for 61 weights"):
        filtered(lora, ",".join(["1"] * 61))


def test_layers_are_kept_and_dropped_by_name():
    lora = whole_lora("sd1")
    text_only = filtered(lora, layers="text_encoder.*")
    assert all(site.startswith("text_encoder.") for site in text_only.sites)
    both = filtered(lora, layers="*.attn2.*, -*to_v, -*up_blocks*")
    assert both.sites
    assert all(
        ".attn2." in s and not s.endswith("to_v") and "up_blocks" not in s for s in both.sites
    )
    rest = filtered(lora, layers="-text_encoder*")
    assert set(rest.sites) == {site for site in lora.sites if site.startswith("unet.")}
    assert "layers, by its blocks and layers" in rest.notes[0]


@pytest.mark.parametrize(
    ("name", "blocks", "layers", "message"),
    [
        ("sd1", "1,0,0", "", "has 3 weights; Stable Diffusion has 17"),
        ("sd1", "OUTSIDE", "", "nor one of NONE, ALL, INS"),
        ("sd1", ",".join("1" * 61), "", "SD 1.x has no blocks for 61 weights"),
        ("flux", "ALL", "", "FLUX.1 has no blocks for 17 weights"),
        ("sd3", "ALL", "", "has no blocks for 17 weights"),
        ("sd1", "", "*attn9*", "no layer name matches '\\*attn9\\*'; one name is "),
        ("sd1", "", "a,,b", "has an empty pattern"),
        ("sd1", "NONE", "*attn*", "leave nothing of it"),
    ],
)
def test_what_names_no_part_of_a_lora_is_refused(name, blocks, layers, message):
    with pytest.raises(IterisError, match=message):
        filtered(whole_lora(name), blocks, layers)


def test_a_merge_takes_the_part_of_a_lora_and_its_recipe_says_so(tmp_path, iteris):
    folder = make_world(tmp_path)
    out = tmp_path / "out.safetensors"
    common = ["merge", folder / "base", "--method", "sum", *QUICK]
    iteris(
        *common, "-o", out,
        "--concept", f"{folder}/lora1.safetensors:a:b,blocks=OUTALL,layers=-text_encoder*,weight=2",
        "--concept", f"{folder}/lora2.safetensors:c:d,layers=*mid_block*",
    )  # fmt: skip
    keys = {key.partition(".")[0] for key in load_file(out)}
    assert keys
    assert all("up_blocks_1" in key or "mid_block" in key for key in keys)
    first, second = (concept["reading"] for concept in recipe_of(out)["concepts"])
    assert (first["blocks"], first["layers"]) == ("OUTALL", "-text_encoder*")
    assert second["layers"] == "*mid_block*"
    again = tmp_path / "again.safetensors"
    iteris(*common[:2], "--from", out, "--loras", folder, "-o", again, *QUICK)
    assert same(out, again)
    merge_file = tmp_path / "merge.yaml"
    merge_file.write_text(
        f"base: {folder}/base\nmethod: sum\noutput: listed.safetensors\nconcepts:\n"
        f"  - file: {folder}/lora1.safetensors\n    trigger: a\n"
        f"    blocks: [{PRESETS['OUTALL']}]\n    layers: [-text_encoder*]\n"
        f"  - {{file: {folder}/lora2.safetensors, trigger: c, layers: '*mid_block*'}}\n"
    )
    iteris("merge", merge_file, *QUICK)
    assert load_file(tmp_path / "listed.safetensors").keys() == load_file(out).keys()
