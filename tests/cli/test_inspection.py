"""``iteris inspect``: facts of files and interference, against dense computations."""

import json

import pytest
import torch
from bases import make_lora, tiny_base
from tiny import random_lora

import toybox
from iteris_core import Lora, LowRank, write_lora
from iteris_core.architectures import architecture_of_file
from iteris_core.lora_files import released_base
from iteris_core.lora_files.blocks import blocks_of
from iteris_core.report.inspection import (
    block_facts,
    block_of,
    describe,
    interference,
    site_interference,
)


def draw(seed, out=12, fan=9, rank=3):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return LowRank(up, torch.randn(rank, fan, generator=generator, dtype=torch.float64))


def test_brackets_of_a_file_are_text(world, host, tmp_path, iteris):
    """Markup of rich: it crashed, or they vanished, or came with backslashes."""
    words = "sks [/b] [red]cat[/red]"
    lora = random_lora(host, 1)
    notes = {"modelspec.trigger_phrase": words}
    file = write_lora(
        Lora(lora.sites, metadata=notes, base=lora.base), tmp_path / "[b]a.safetensors"
    )
    told = iteris("inspect", file, "--base", world / "base")
    assert words in told
    assert "[b]a" in told
    out = tmp_path / "out.safetensors"
    summary = iteris("resize", file, "--rank=2", "-o", out)
    assert summary.startswith("[b]a: rank")
    noted = iteris(
        "convert", file, "--base", world / "base", "--layout=peft", "-o", out, "--overwrite"
    )
    assert "\\" not in noted + summary


@pytest.mark.parametrize("seed", range(2))
def test_interference_of_a_site_against_projections(seed):
    one, two = draw(seed), draw(seed + 10, rank=2)
    rows, columns, conflict, weight = site_interference(one, two)
    for found, a, b in ((rows, one.down.mT, two.down.mT), (columns, one.up, two.up)):
        # tr(P_a P_b) of the two orthogonal projections is the sum of the squared cosines.
        overlap = float(((a @ torch.linalg.pinv(a)) * (b @ torch.linalg.pinv(b))).sum())
        assert found == pytest.approx(overlap / min(a.shape[1], b.shape[1]))
    a, b = one.dense(), two.dense()
    total = float((a**2).sum() + (b**2).sum())
    assert conflict == pytest.approx(2 * abs(float((a * b).sum())) / total)
    assert weight == pytest.approx(float(a.norm() * b.norm()))


def test_equal_opposite_and_orthogonal_changes():
    one = draw(1)
    assert site_interference(one, one)[:3] == pytest.approx((1, 1, 1))
    assert site_interference(one, one.scaled(-1.0))[:3] == pytest.approx((1, 1, 1))
    left = LowRank(torch.eye(4)[:, :2], torch.eye(6)[:2])
    right = LowRank(torch.eye(4)[:, 2:], torch.eye(6)[2:4])
    assert site_interference(left, right)[:3] == (0, 0, 0)
    assert site_interference(left, LowRank(torch.zeros(4, 1), torch.zeros(1, 6)))[3] == 0


def test_blocks_add_up():
    one, two = make_lora("sd1", seed=1), make_lora("sd1", seed=2)
    names = blocks_of(one.base)
    facts = block_facts(one)
    for block, fact in facts.items():
        dense = [c.dense() for s, c in one.sites.items() if (names.get(s) or block_of(s)) == block]
        squared = float(sum((d**2).sum() for d in dense))
        assert (fact.layers, fact.norm) == (len(dense), pytest.approx(squared**0.5, rel=1e-4))
    assert sum(fact.share for fact in facts.values()) == pytest.approx(1)
    assert sum(fact.layers for fact in facts.values()) == len(one.sites)
    pair = interference(one, two)
    assert pair.shared == len(one.sites)
    assert interference(one, one).conflict == pytest.approx(1.0)
    only = next(iter(two.sites))
    few = Lora({only: two.sites[only]}, "few")
    found = interference(one, few)
    rows, columns, conflict, _ = site_interference(one.sites[only], two.sites[only])
    assert found.shared == 1
    assert (found.rows, found.columns, found.conflict) == pytest.approx((rows, columns, conflict))


def test_facts():
    lora = make_lora("sdxl", ranks=(2, 4))
    facts = describe(lora)
    assert facts.base == "SDXL"
    assert set(facts.ranks) == {2, 4}
    assert sum(facts.ranks.values()) == facts.sites == len(lora.sites)
    total = sum(1 for site in tiny_base("sdxl").shapes if site.startswith("unet."))
    assert facts.coverage["unet"][1] == total


def real_lora(kind: str, seed: int, rank: int = 2) -> Lora:
    """A few sites of a real base model."""
    base = released_base(kind)
    parts = ("attn.to_q", "attn.to_k", "attn2.to_k", "attn1.to_q", "layers.0.self_attn.q_proj")
    sites = [s for s in base.shapes if s.endswith(parts)][:30]
    if kind == "flux":
        sites += [s for s in base.shapes if "single" in s and ".1.attn.to_" in s]
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for site in sites:
        out, fan = base.shapes[site][:2]
        up = torch.randn(out, rank, generator=generator)
        changes[site] = LowRank(up, torch.randn(rank, fan, generator=generator) / fan)
    return Lora(changes, f"{kind}-{seed}", {"modelspec.trigger_phrase": f"sks{seed}"}, base=base)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_the_base_of_a_file_is_told_from_its_keys(kind, layout, tmp_path):
    lora = real_lora(kind, 1)
    path = write_lora(lora, tmp_path / "a.safetensors", layout=layout)
    from iteris_core.lora_files import read_tensors

    tensors, metadata = read_tensors(path)
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    assert architecture_of_file(shapes, metadata).name == kind
    assert architecture_of_file(shapes, {}).name == kind


def test_the_command(tmp_path, iteris):
    files = [
        write_lora(real_lora("sd1", 1), tmp_path / "one.safetensors"),
        write_lora(real_lora("sd1", 2, rank=3), tmp_path / "two.safetensors", layout="peft"),
    ]
    found = json.loads(iteris("inspect", *files, "--json"))
    one = found["files"][0]
    assert (one["base"], one["dtypes"], one["triggers"]) == ("SD 1.x", {"float16": 62}, ["sks1"])
    assert found["interference"][0]["shared"] == 30
    assert 0 < found["interference"][0]["rows"] < 0.2
    text = iteris("inspect", *files)
    assert "row spaces" in text
    assert "shared" in text
    other = write_lora(real_lora("sdxl", 1), tmp_path / "xl.safetensors")
    assert json.loads(iteris("inspect", files[0], other, "--json"))["interference"] == []
    text = iteris("inspect", files[0], other)
    assert "one is a LoRA for SD 1.x, xl for SDXL: they have no layer in common" in text
    assert "shared sites" not in text


def test_a_base_of_another_shape_is_loaded(host, tmp_path, iteris):
    host.pipeline.save_pretrained(tmp_path / "base")
    file = write_lora(random_lora(host, 1), tmp_path / "lora.safetensors")
    assert "give its base (--base; for merge, BASE)" in iteris.refused("inspect", file)
    text = iteris("inspect", file, f"--base={tmp_path / 'base'}", "--json")
    coverage = json.loads(text)["files"][0]["coverage"]
    sites = {name.partition(".")[0] for name in host.sites()}
    assert set(coverage) == sites
    assert all(0 < count <= of for count, of in coverage.values())


def test_what_ships_is_read_without_naming_its_base(iteris):
    files = [toybox.concepts()[name].lora for name in ("sks1", "sks10")]  # kohya's and diffusers'
    text = iteris("inspect", *files, "--json")
    assert json.loads(text)["interference"][0]["shared"] == 68  # every attention projection
