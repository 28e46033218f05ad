"""Texts of several lengths, without padding."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import reduced_models
import torch

from iteris_core.activations.lockstep import Lockstep


@pytest.mark.parametrize("kind", ["zimage", "qwen"])
def test_texts_of_several_lengths_are_what_a_sampler_gives(pack: ModuleType, kind: str) -> None:
    """No padding: conditionings are ComfyUI's own, and their inputs batch within a length only."""
    text: Any = importlib.import_module(f"{pack.__name__}.nodes.comfy_text")
    denoiser: Any = importlib.import_module(f"{pack.__name__}.nodes.comfy_denoiser")
    conds: Any = importlib.import_module(f"{pack.__name__}.nodes.comfy_conds")
    model, clip = getattr(reduced_models, kind)()
    encoders = text.TextEncoders(clip)
    prompts = ["", "a cat", "a dog", "a large cat on the beach"]
    tokens = encoders.tokenize([0] * 4, prompts)
    encoders.load()
    batches = encoders.batches([0] * 4, tokens, {}, set())
    for batch in batches.values():
        batch.run_all(2, Lockstep({}, {}))
    found = encoders.assemble([0] * 4, tokens, batches, 0, None)
    with torch.inference_mode():
        for prompt, (cond, extra) in zip(prompts, found, strict=True):
            ((wanted, more),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
            assert torch.allclose(cond, wanted, atol=1e-5)
            assert set(extra) == set(more)
    inputs = [denoiser.Denoiser(model).inputs(some, (1, 16, 1, 8, 8)) for some in found]
    kinds = [conds.kind(some) for some in inputs]
    assert kinds[1] == kinds[2]
    assert len(set(kinds)) == 3
