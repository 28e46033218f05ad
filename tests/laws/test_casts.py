"""Changes are converted to a model's dtype once for each site, however many forwards run."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from iteris_core.activations.lockstep import Lockstep
from iteris_core.activations.micro_batch import MicroBatch
from iteris_core.lora import LowRank, SiteChanges


@dataclass(frozen=True)
class Counted(LowRank):
    """Counts its conversions."""

    def to(self, dtype=None, device=None):
        conversions.append(self)
        return super().to(dtype, device)


conversions: list[LowRank] = []


def change(dtype=torch.float32) -> Counted:
    return Counted(torch.randn(4, 2, dtype=dtype), torch.randn(2, 4, dtype=dtype))


@pytest.mark.parametrize("merged_only", [False, True])
def test_the_merged_change_is_converted_once(merged_only):
    conversions.clear()
    model = nn.Linear(4, 4).bfloat16()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    with Lockstep({"site": model}, {"site": SiteChanges((change(),))}) as lockstep:
        for merged in (change(), change()):
            conversions.clear()
            lockstep.merged = {"site": merged}
            copies = 1 if merged_only else 2
            for _ in range(3):
                owners = [0] * (2 // copies)
                lockstep.run(MicroBatch(lambda: model(x), owners, copies, merged_only=merged_only))
            assert [c for c in conversions if c is merged] == [merged]
        assert lockstep.cast_bytes == (1 if merged_only else 2) * 2 * (4 * 2 * 2)


def test_a_change_that_is_trained_is_converted_every_time():
    model, merged = nn.Linear(4, 4).bfloat16(), change()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    merged.up.requires_grad_()
    outputs = []
    with Lockstep({"site": model}, {"site": SiteChanges((change(),))}) as lockstep:
        lockstep.merged = {"site": merged}
        for _ in range(2):
            batch = MicroBatch(lambda: outputs.append(model(x)), [0, 0], 1, merged_only=True)
            lockstep.run(batch, grad=True)
            outputs[-1].sum().backward()
            with torch.no_grad():
                merged.up.add_(1.0)
    assert not torch.equal(outputs[0], outputs[1])
