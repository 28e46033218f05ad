"""Bases in half precision, and bases with offloaded weights."""

import dataclasses

import pytest
import torch
from accelerate import cpu_offload
from bases import outputs
from host_cases import CALIBRATION, DENOISER, PIPELINES, DiffusersCase, make_case, two_concepts

from iteris_core import Lora, merge_loras


def merged_output(kind, lora):
    """The denoiser of a float32 pipeline with ``lora`` in its weights."""
    case = DiffusersCase(kind, torch.float32)
    for site, change in lora.sites.items():
        weight = case.host.sites()[site].weight
        weight.data += change.dense().float().reshape(weight.shape)
    return outputs(kind, case.pipeline)[DENOISER[kind]]


def small_concepts(case):
    """LoRAs that move the model a little, so that rounding is not blown up on the way."""
    return [
        case.concept(Lora({s: c.scaled(0.2) for s, c in case.lora(seed).sites.items()}), seed)
        for seed in (1, 2)
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("kind", PIPELINES)
def test_a_half_precision_base_merges_as_well(kind):
    """The merge's error against each LoRA alone, in float32, on inputs that no merge saw.

    A dozen samples do not fix every direction of the changes; the ridge is what two merges share.
    Rows are what the pipeline makes in its own precision: of FLUX, most of whose tokens are T5's
    padding, bfloat16 had 2 to 8 % more error over four seeds.
    """
    none = dict.fromkeys(("contexts", "generic", "conditions"), 0.0)
    calibration = dataclasses.replace(CALIBRATION, samples=12, **none)
    concepts = small_concepts(DiffusersCase(kind, torch.float32))
    base = merged_output(kind, Lora({}, "none"))
    own = [merged_output(kind, concept.lora) for concept in concepts]
    errors, merges, settings = {}, {}, {"ridge": 1e-3, "steps": 0}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        host = DiffusersCase(kind, dtype).host
        result = merge_loras(host, concepts, settings=settings, calibration=calibration)
        found = merges[dtype] = merged_output(kind, result.lora)
        gaps = [(found - y).square().sum() / (base - y).square().sum() for y in own]
        errors[dtype] = float(sum(gaps)) / len(gaps)
    moved = (merges[torch.float32] - base).norm()
    for dtype, limit, apart in ((torch.float16, 0.01, 0.02), (torch.bfloat16, 0.1, 0.15)):
        assert errors[dtype] < (1 + limit) * errors[torch.float32]
        assert float((merges[dtype] - merges[torch.float32]).norm() / moved) < apart


@pytest.mark.parametrize("kind", ["decoder", pytest.param("sd1", marks=pytest.mark.slow)])
def test_weights_may_be_offloaded(kind):
    """accelerate brings each module's weights in when it runs; they are on no device until then."""
    plain, away = make_case(kind), make_case(kind)
    for model in away.models():
        cpu_offload(model, torch.device("cpu"))
    assert next(away.last.parameters()).device.type == "meta"
    ours, theirs = (
        merge_loras(case.host, two_concepts(plain), calibration=CALIBRATION).lora
        for case in (away, plain)
    )
    for site, change in theirs.sites.items():
        assert torch.equal(ours.sites[site].up, change.up)
        assert torch.equal(ours.sites[site].down, change.down)
    assert next(away.last.parameters()).device.type == "meta"
