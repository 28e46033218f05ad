"""Our merge on a T5 against the authors' algorithm, site by site."""

import copy

import pytest
import torch
from official import inputs_of, official
from transformers import T5Config, T5ForConditionalGeneration

from iteris_core import Calibration, Concept, Lora, LowRank, merge_loras
from iteris_core.hosts.transformers import TransformersHost

pytestmark = pytest.mark.usefixtures("unmeasured")


def make_t5(**sizes) -> T5ForConditionalGeneration:
    """FLAN-T5's layout: gated feed-forward, an output head of its own; random weights."""
    torch.manual_seed(0)
    config = T5Config(
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        **sizes,
    )
    return T5ForConditionalGeneration(config).eval()


def make_loras(model, count: int, rank: int, generator) -> list[Lora]:
    """Rank-``rank`` changes of q and v of every attention, as the paper trains them."""
    loras = []
    for index in range(count):
        sites = {}
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in ("q", "v"):
                out, fan = module.weight.shape
                up = torch.randn(out, rank, generator=generator)
                down = torch.randn(rank, fan, generator=generator) / fan**0.5
                size = float(module.weight.norm()) / (up @ down).norm() * 0.3
                sites[f"model.{name}"] = LowRank(up * size, down)
        loras.append(Lora(sites, f"task {index}"))
    return loras


def make_samples(rows: int, length: int, vocabulary: int, generator):
    """Batches for one task, teacher-forced; each task reads other words."""
    start = int(torch.randint(3, vocabulary // 2, (), generator=generator))
    words = lambda n: torch.randint(start, vocabulary, (rows, n), generator=generator)  # noqa: E731
    return [{"input_ids": words(length), "decoder_input_ids": words(length // 2)}]


def gaps(model, loras, samples, *, iterations, pretrained, alpha=1e-7):
    """(relative distance of the changes, of their outputs on the merged inputs) for every site."""
    names = [site.removeprefix("model.") for site in loras[0].sites]
    adapters = [{n: lora.sites[f"model.{n}"].dense() for n in names} for lora in loras]
    how = {"iterations": iterations, "alpha": alpha, "pretrained": pretrained}
    theirs = official(model, adapters, samples, **how)
    full = {"objective": "output", "weighting": "full"}
    settings = full if pretrained else {"objective": "adapter", "weighting": "adapter"}
    settings |= {"schedule": "jacobi", "iterations": iterations, "ridge": alpha, "shrink": 1.0}
    settings |= {"rank": 10_000, "repair": False, "precision": "float64"}
    ours = merge_loras(
        TransformersHost(model),
        [Concept(lora, inputs=batches) for lora, batches in zip(loras, samples, strict=True)],
        settings=settings,
        calibration=Calibration(samples=1000),
    ).lora
    base = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    seen = [inputs_of(model, theirs, base, batches) for batches in samples]
    found = {}
    for name in names:
        mine, other = ours.sites[f"model.{name}"].dense().double(), theirs[name].double()
        x = torch.cat([inputs[name] for inputs in seen]).double()
        apart = mine - other
        found[name] = (
            float(apart.norm() / other.norm()),
            float((x @ apart.mT).norm() / (x @ other.mT).norm()),
        )
    return found


@pytest.fixture(scope="module")
def tiny():
    generator = torch.Generator().manual_seed(1)
    model = make_t5(vocab_size=80, d_model=24, d_kv=12, d_ff=48, num_layers=2, num_heads=2).double()
    samples = [make_samples(12, 10, 80, generator) for _ in range(3)]
    return model, make_loras(model, 3, 3, generator), samples


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("count", [2, 3])
def test_adapter_objective_is_the_papers_algorithm(tiny, iterations, count):
    model, loras, samples = tiny
    before = copy.deepcopy(model.state_dict())
    found = gaps(model, loras[:count], samples[:count], iterations=iterations, pretrained=False)
    assert len(found) == 12
    assert max(change for change, _ in found.values()) < 1e-5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("count", [2, 3])
def test_the_preset_paper_is_the_papers_algorithm(tiny, count):
    model, loras, samples = tiny
    loras, samples = loras[:count], samples[:count]
    names = [site.removeprefix("model.") for site in loras[0].sites]
    adapters = [{n: lora.sites[f"model.{n}"].dense() for n in names} for lora in loras]
    theirs = official(model, adapters, samples, iterations=20, alpha=1e-4, pretrained=False)
    ours = merge_loras(
        TransformersHost(model),
        [Concept(lora, inputs=batches) for lora, batches in zip(loras, samples, strict=True)],
        preset="paper",
        settings={"precision": "float64"},
    ).lora
    assert set(ours.sites) == {f"model.{name}" for name in names}
    for name in names:
        change = ours.sites[f"model.{name}"].dense().double()
        assert (change - theirs[name]).norm() < 1e-6 * theirs[name].norm()


def test_full_objective_is_the_authors_with_pretrained_matrix(tiny):
    """Within 4 %: λ lacks ‖W0 + ΔW_i‖², nearly one factor for all LoRAs, and the ridge pulls to
    ΔW_i in place of W0 + ΔW_i."""
    model, loras, samples = tiny
    found = gaps(model, loras[:2], samples[:2], iterations=4, pretrained=True, alpha=1e-9)
    assert max(outputs for _, outputs in found.values()) < 0.04


@pytest.mark.slow
def test_a_t5_of_flan_t5_bases_widths():
    generator = torch.Generator().manual_seed(2)
    widths = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_heads": 12}
    model = make_t5(vocab_size=2000, num_layers=2, num_decoder_layers=1, **widths)
    loras = make_loras(model, 2, 8, generator)
    samples = [make_samples(32, 16, 2000, generator) for _ in loras]
    found = gaps(model, loras, samples, iterations=2, pretrained=False, alpha=1e-4)
    assert len(found) == 8
    assert max(change for change, _ in found.values()) < 1e-3
    assert max(outputs for _, outputs in found.values()) < 1e-4
