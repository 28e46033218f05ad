import pytest
import rivals  # noqa: F401 (registers them)
import torch
from tiny import random_lora

from iteris_core import Calibration, Concept, IterisError, merge_loras

pytestmark = pytest.mark.usefixtures("unmeasured")

PROMPTS = ["a s1 dog on a table", "a photo of a dog in the rain", "two dogs", "a cat", "a red car"]


def kv(site):
    return site.endswith(("attn2.to_k", "attn2.to_v"))


def test_each_concepts_own_tokens_keep_their_keys_and_values(host64):
    def select(site):
        return kv(site) or "attn1.to_q" in site

    loras = [random_lora(host64, seed, select=select) for seed in (1, 2)]
    concepts = [
        Concept(lora, prompts=PROMPTS, trigger=trigger, class_word="dog")
        for trigger, lora in zip("xq", loras, strict=True)
    ]
    calibration = Calibration(samples=5, timesteps=1)
    result = merge_loras(
        host64, concepts, "custom-diffusion", settings={"ridge": 1e-9}, calibration=calibration
    )
    pipeline = host64.pipeline
    for concept, lora in zip(concepts, loras, strict=True):
        with torch.no_grad():
            tokens = pipeline.encode_prompt([concept.subject], "cpu", 1, False)[0][0]
        for site in filter(kv, lora.sites):
            wanted = tokens @ lora.sites[site].dense().mT
            found = tokens @ result.lora.sites[site].dense().mT
            words = slice(1, len(pipeline.tokenizer(concept.subject).input_ids))
            error = (found - wanted)[words].norm() / wanted[words].norm()
            assert float(error) < 0.05
    mean = merge_loras(None, concepts, "average").lora
    for site in mean.sites:
        if not kv(site):
            assert torch.allclose(result.lora.sites[site].dense(), mean.sites[site].dense())


def test_without_cross_attention_it_is_an_error(host):
    lora = random_lora(host, 1, select=lambda s: "attn1.to_q" in s)
    with pytest.raises(IterisError, match="none of these LoRAs"):
        merge_loras(host, [Concept(lora, prompts=["a"])], "custom-diffusion")
