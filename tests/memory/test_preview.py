"""A preview predicts the merge, and leaves nothing behind."""

import pytest
import torch
from oracle import Net, hooks_on, make_data, make_lora
from test_preflight import CASES, Half, PictureHost, concepts

from iteris_core import Concept, IterisError, merge_loras
from iteris_core.preview import preview_merge


def host_of(model):
    return PictureHost(model(), make_data())


def test_the_plan_is_the_merge_s():
    some = [Concept(make_lora(i, sites=("q",)), prompts=["unused"]) for i in (1, 2)]
    found = preview_merge(host_of(Net), some, memory_budget=2**30, settings={"repair": False})
    host = host_of(Net)
    before = {name: weight.clone() for name, weight in host.model.state_dict().items()}
    made = merge_loras(host, some, memory_budget=2**30, settings={"repair": False})
    seconds = ", about "
    assert [line.partition(seconds)[0] for line in found.plan] == [
        line.partition(seconds)[0] for line in made.report.plan
    ]
    assert found.plan
    assert (found.unmergeable, found.complaint) == ({}, "")
    preview_merge(host, some, memory_budget=2**30)
    assert hooks_on(host.model) == 0
    assert all(torch.equal(before[n], w) for n, w in host.model.state_dict().items())


@pytest.mark.parametrize(("model", "why"), CASES)
def test_what_cannot_be_merged_is_said(model, why):
    found = preview_merge(host_of(model), concepts(), memory_budget=2**30)
    assert set(found.unmergeable) == {"up"}
    assert "1 sites, such as up (in lora-1, lora-2): it" in found.complaint
    assert why in found.complaint


def test_weights_alone_need_no_rows():
    found = preview_merge(host_of(Half), concepts(), "ties")
    assert found.plan == ["ties looks at weights only: no rows"]
    assert found.denoised == 0


def test_nothing_to_merge():
    with pytest.raises(IterisError, match="no LoRA to merge"):
        preview_merge(host_of(Half), [])
