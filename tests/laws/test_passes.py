"""Runs over several stages of a model."""

import sys
from dataclasses import replace

import pytest
import torch
from oracle import SITES, ModuleHost, Net, make_data, make_lora, rows_of
from tiny import random_lora

from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.errors import IterisError
from iteris_core.hosts.protocol import Stage
from iteris_core.passes.batches import fewer


def test_stages_do_not_share_inputs(host):
    """Changes of the text encoder that do nothing do nothing to the UNet's sites."""
    calibration = Calibration(samples=2, timesteps=1, latents="noise")

    def concepts(with_text: bool):
        def chosen(site: str) -> bool:
            text = site.endswith(("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"))
            return site.endswith("attn1.to_q") or (with_text and text)

        for seed in (1, 2):
            sites = random_lora(host, seed, select=chosen).sites
            unet = random_lora(host, seed, select=lambda site: site.endswith("attn1.to_q")).sites
            yield Concept(
                Lora({site: unet.get(site, c.scaled(0.0)) for site, c in sites.items()}),
                trigger=f"t{seed}",
            )

    def merge(with_text: bool):
        return merge_loras(
            host, list(concepts(with_text)), "regmean", calibration=calibration
        ).lora.sites

    alone, together = merge(False), merge(True)
    for site, change in alone.items():
        torch.testing.assert_close(together[site].dense(), change.dense())


class Kinds(ModuleHost):
    """Rows of two lengths, in turn, which only run among their like."""

    def __init__(self) -> None:
        super().__init__(Net(), make_data(rows=7))
        self.batches: list[list[int]] = []

    def stages(self, samples, sites):
        (stage,) = super().stages(samples, sites)
        inputs = torch.cat(list(samples))

        def forward(rows, copies):
            (long,) = {row.key for row in rows}
            self.batches.append([row.number for row in rows])
            self.model(torch.cat([inputs[self.batches[-1], : 12 if long else 6]] * copies))

        rows = [replace(r, key=r.number % 2, length=r.number % 2) for r in stage.rows]
        yield replace(stage, rows=rows, forward=forward)


class LongNet(Net):
    """Like Net, for any even number of tokens."""

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        h = x + self.out((q @ k.mT / 4).softmax(-1) @ v)
        h = h + self.down(torch.relu(self.up(h)))
        return self.conv(h.reshape(h.shape[0], 3, h.shape[1] // 3, -1)).flatten(1)


@pytest.mark.parametrize("method", ["iteris", "jacobi", "regmean"])
def test_only_rows_of_one_kind_share_a_forward_and_their_number_changes_nothing(method):
    concepts = [Concept(make_lora(seed), prompts=["unused"]) for seed in (1, 2)]
    options = {"precision": "float64"} if method != "regmean" else {}
    if method == "jacobi":
        options |= {"schedule": "jacobi", "iterations": 2}
    name = "regmean" if method == "regmean" else "iteris"

    def merge(size):
        host = Kinds()
        host.model = LongNet()
        settings = {**options, "micro_batch": size}
        result = merge_loras(host, concepts, name, settings=settings, memory_budget=None)
        assert {row for batch in host.batches for row in batch} == set(range(14))
        assert max(map(len, host.batches)) == min(size, 7)
        return result.lora.sites

    whole, small = merge(32), merge(3)
    for site in SITES:
        wanted = whole[site].dense()
        assert (small[site].dense() - wanted).norm() < 1e-6 * wanted.norm(), site


@pytest.mark.parametrize("kept", [40, 50, 67, 100, 133, 150, 199, 200])
def test_rows_that_are_left_out_are_of_all_steps_and_of_most_samples(kept):
    """Rows go by sample and then by step; every fourth would always be the noisiest."""
    samples, steps, ran = 50, 4, []
    owners = [concept for concept in range(2) for _ in range(samples * steps)]
    forward = lambda rows, copies: ran.extend(row.number for row in rows)  # noqa: E731
    stage = fewer(Stage("unet", [], rows_of(owners), forward), 2 * kept)
    stage.forward(stage.rows, 1)
    assert [owners[row] for row in ran] == [0] * kept + [1] * kept
    for concept in range(2):
        mine = [row for row in ran if owners[row] == concept]
        assert len({row // steps for row in mine}) >= 0.85 * min(kept, samples)
        by_step = [sum(row % steps == step for row in mine) for step in range(steps)]
        assert max(by_step) - min(by_step) <= 0.2 * kept


@pytest.mark.parametrize("count", [3, 4, 10, 60, 103, 104])
def test_each_concept_has_a_row_however_few_are_kept(count):
    owners = [0] * 100 + [1] * 3 + [2]
    stage = fewer(Stage("unet", [], rows_of(owners), lambda rows, copies: None), count)
    assert {row.concept for row in stage.rows} == {0, 1, 2}
    assert count - 2 <= len(stage.rows) <= count


def test_without_greenlet_a_sweep_says_so_at_once_and_others_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "greenlet", None)
    host = ModuleHost(Net(), make_data())
    concepts = [Concept(make_lora(seed), prompts=["unused"]) for seed in (1, 2)]
    with pytest.raises(IterisError, match=r"pip install greenlet\. Without it.*jacobi"):
        merge_loras(host, concepts)
    assert not host.copies_seen
    settings = {"schedule": "jacobi", "iterations": 1}
    assert merge_loras(host, concepts, settings=settings).lora.sites
