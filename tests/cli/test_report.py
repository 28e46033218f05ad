from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from oracle import ModuleHost, Net, make_data, make_lora

from iteris_core import Concept, IterisError, LowRank, merge_loras
from iteris_core.report.plots import plot_residuals
from iteris_core.report.report import MergeReport, SiteReport, block_of
from iteris_core.solve.problem import Solution


@pytest.mark.parametrize(
    ("site", "block"),
    [
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.1"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block"),
        ("text_encoder.text_model.encoder.layers.3.mlp.fc1", "text_encoder.layers.3"),
        ("transformer.single_transformer_blocks.7.proj_mlp", "single_transformer_blocks.7"),
        ("unet.conv_in", "unet.conv_in"),
        ("model.encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0"),
        ("model.decoder.block.0.layer.1.EncDecAttention.q", "decoder.block.0"),
    ],
)
def test_blocks(site, block):
    assert block_of(site) == block


def report():
    concepts = [Concept(make_lora(i), prompts=["unused"], trigger=f"s{i}") for i in (1, 2)]
    settings = {"schedule": "jacobi", "iterations": 4}
    return merge_loras(ModuleHost(Net(), make_data(2)), concepts, settings=settings).report


def test_a_report_says_what_happened_in_words_and_as_data():
    found = report()
    assert len(found.convergence) == 3
    data = json.loads(json.dumps(found.to_dict()))
    assert set(data["residuals"]) == {"s1", "s2"}
    for before, after in found.residuals():
        assert 0 < after < before
    assert "Merged 2 concepts with iteris: 7 sites" in found.summary()
    assert found.verdict() in found.summary()
    assert data["verdict"] == found.verdict()
    assert "%" not in found.summary()


def test_the_verdict_names_the_lora_that_is_kept_least():
    sites = {
        "unet.down_blocks.0.a": SiteReport(1, (0.5, 0.5), (1.0, 1.0), (0.1, 0.2)),
        "unet.up_blocks.1.a": SiteReport(1, (0.5, 0.5), (1.0, 1.0), (0.5, 0.9)),
    }
    found = MergeReport("iteris", ["cat", "dog"], sites, 1.0)
    assert found.verdict() == (
        "Closer to what every LoRA does than the mean of the LoRAs is; least so for dog."
    )
    worse = {"unet.up_blocks.1.a": SiteReport(1, (0.5, 0.5), (1.0, 0.5), (0.1, 0.6))}
    assert replace(found, sites=worse).verdict().startswith("NOT CLOSER to dog than the mean")
    # What is preserved has no change of its own that an error could be a part of.
    kept = replace(found, sites=worse, preserved=["dog"])
    assert kept.verdict() == "Closer to what cat does than the mean of the LoRAs is."
    assert MergeReport("iteris", ["cat"], {}, 1.0).verdict() == ""
    assert found.blocks()["up_blocks.1"] == [(1.0, 0.5), (1.0, 0.9)]


def test_a_site_report_is_what_its_solution_says():
    change = LowRank(torch.ones(3, 2), torch.ones(2, 4))
    solution = Solution(change, (0.5, 0.5), (1.0, 0.9), (0.2, 0.3), 9.0, 0.1)
    found = SiteReport.of(solution, 1, repair=True)
    assert found == SiteReport(2, (0.5,), (1.0,), (0.2,), 9.0, 0.1, True)


def test_a_summary_is_loud_about_iterations_that_did_not_converge():
    sites = {"unet.a": SiteReport(1, (1.0,), (1.0,), (0.1,))}
    found = MergeReport("iteris", ["cat"], sites, 1.0)
    assert "CONVERGE" not in found.summary()
    assert "DID NOT CONVERGE" in replace(found, convergence=(0.5, 0.031)).summary()
    assert "Converged after 3" in replace(found, convergence=(0.5, 1e-4)).summary()
    loose = replace(found, convergence=(0.5, 0.031), settings={"tolerance": 0.05})
    assert loose.converged


def test_plots_are_drawn(tmp_path):
    found = report()
    path = tmp_path / "residuals.png"
    plot_residuals(found).savefig(path)
    assert path.stat().st_size > 5000
    average = merge_loras(None, [Concept(make_lora(1))], "average").report
    with pytest.raises(IterisError, match="measures no output errors"):
        plot_residuals(average)


def test_what_was_not_measured_is_null_in_json():
    """Of a method that only looks at weights there is no condition and no error."""
    report = merge_loras(None, [Concept(make_lora(seed)) for seed in (1, 2)], "sum").report
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["sites"]["q"]["condition"] is None
    assert data["residuals"]["lora-1"] == {"before": None, "after": None}
