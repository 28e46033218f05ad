"""Block polish: every part gets closer to its output under each LoRA, and nothing else changes."""

import pytest
import torch
from oracle import ModuleHost, changed, dense_changes
from pipelines import PIPELINES, two_concepts
from tiny import random_lora
from torch import nn

from iteris_core import Calibration, Concept, Lora, LowRank, merge_loras
from iteris_core.methods import block_polish
from iteris_core.methods.block_polish import Whitening

WIDTH = 12


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, scale: float = 4.0) -> torch.Tensor:
        attended = (self.q(x) @ self.k(x).mT / scale).softmax(-1) @ self.v(x)
        return x + self.out(attended)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        self.last = nn.Linear(WIDTH, WIDTH)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, scale=0.3)  # a sharp attention, which no layer's own error tells of
        return self.last(x)


SITES = [f"blocks.{i}.{name}" for i in range(3) for name in ("q", "k", "v", "out")] + ["last"]


class BlocksHost(ModuleHost):
    def sites(self):
        return {name: self.model.get_submodule(name) for name in SITES}


def loras_of(count: int = 3) -> list[Lora]:
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        changes = {
            site: LowRank(
                torch.randn(WIDTH, 2, generator=generator, dtype=torch.float64),
                torch.randn(2, WIDTH, generator=generator, dtype=torch.float64) * 0.03,
            )
            for site in SITES
        }
        found.append(Lora(changes, f"lora-{seed}"))
    return found


def data_of(count: int = 3) -> list[torch.Tensor]:
    """24 rows of 12 tokens of each concept, around a mean of its own."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(9 + seed)
        rows = torch.randn(24, 12, WIDTH, generator=generator, dtype=torch.float64)
        found.append(rows + 2 * torch.randn(WIDTH, generator=generator, dtype=torch.float64))
    return found


def merged(model: nn.Module, data, loras, **settings):
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    return merge_loras(BlocksHost(model, data), concepts, settings=settings)


def said(result) -> str:
    return str(result.report.notes)


def errors(lora: Lora, loras, data) -> float:
    """Σ over concepts of ‖merged(x) − own(x)‖² / ‖own(x) − base(x)‖², with weights changed."""
    total = 0.0
    with torch.no_grad():
        for one, x in zip(loras, data, strict=True):
            wanted = changed(Blocks(), dense_changes(one))(x)
            found = changed(Blocks(), dense_changes(lora))(x)
            total += float((found - wanted).norm() ** 2 / (wanted - Blocks()(x)).norm() ** 2)
    return total


@pytest.mark.parametrize("count", [40, 7])  # more tokens than inputs, and fewer
def test_whitening_is_the_root_of_the_moments(count):
    tokens = torch.randn(count, 10, dtype=torch.float64) * torch.logspace(-2, 1, 10)
    gram = tokens.mT @ tokens
    moments = gram * 10 / gram.trace() + 1e-3 * torch.eye(10, dtype=torch.float64)
    found = Whitening.of(tokens, 1e-3)
    rows = torch.randn(3, 10)
    root = found.root(torch.eye(10))
    assert torch.allclose(root @ root, moments.float(), atol=1e-5)
    assert torch.allclose(found.inverse_root(found.root(rows)), rows, atol=1e-4)


def test_polish_lowers_the_error_and_leaves_the_base_as_it_was():
    loras, data, model = loras_of(), data_of(), Blocks()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = merged(model, data, loras)
    polished = merged(model, data, loras, block_steps=100)
    assert errors(polished.lora, loras, data) < 0.8 * errors(plain.lora, loras, data)
    assert polished.lora.ranks == {6}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    for site, change in polished.lora.sites.items():
        assert not change.up.requires_grad
        assert not change.down.requires_grad
        assert change.up.dtype == plain.lora.sites[site].up.dtype
    assert torch.equal(polished.lora.sites["last"].up, plain.lora.sites["last"].up)


def test_polish_is_the_same_again_and_never_ends_worse():
    loras, data = loras_of(), data_of()
    first, second = (merged(Blocks(), data, loras, block_steps=10).lora for _ in range(2))
    plain = merged(Blocks(), data, loras).lora
    wild = merged(Blocks(), data, loras, block_steps=10, block_rate=1e4).lora
    for site in SITES:
        assert torch.equal(first.sites[site].up, second.sites[site].up)
        assert torch.equal(wild.sites[site].up, plain.sites[site].up)


class Scarce(Attention):
    """Has no memory for gradients of more than ``most`` rows."""

    most = 4

    def forward(self, x: torch.Tensor, scale: float = 4.0) -> torch.Tensor:
        if torch.is_grad_enabled() and len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x, scale)


def test_without_memory_fewer_rows_go_at_once_and_then_a_block_stays():
    loras, data, model = loras_of(), data_of(), Blocks()
    plain = merged(model, data, loras).lora
    model.blocks = nn.ModuleList(Scarce() for _ in range(3)).double()
    model.load_state_dict(Blocks().state_dict())
    model.blocks[1].most = 0
    result = merged(model, data, loras, block_steps=5)
    assert torch.equal(result.lora.sites["blocks.1.q"].up, plain.sites["blocks.1.q"].up)
    assert not torch.equal(result.lora.sites["blocks.0.q"].up, plain.sites["blocks.0.q"].up)
    assert "blocks.1.q to blocks.1.out are not polished, for lack of memory" in said(result)


class InPlace(Attention):
    def forward(self, x: torch.Tensor, scale: float = 4.0) -> torch.Tensor:
        x = x + 0.0
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:])
        x += super().forward(normed, scale)  # what its normalisation keeps for its gradient
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:])
        x += normed
        return x


def test_what_a_block_changes_in_place_has_gradients():
    loras, data, model = loras_of(), data_of(), Blocks()
    model.blocks = nn.ModuleList(InPlace() for _ in range(3)).double()
    plain, result = (merged(model, data, loras, block_steps=steps) for steps in (0, 20))
    moved = [
        site
        for site, change in plain.lora.sites.items()
        if not torch.equal(change.up, result.lora.sites[site].up)
    ]
    assert set(moved) == set(SITES[:-1])
    assert not result.report.notes


def test_polish_of_a_pipeline_tells_its_progress_and_can_be_cancelled(host):
    concepts = [Concept(random_lora(host, s), prompts=["a dog", "a cat"]) for s in (1, 2)]
    calibration = Calibration(samples=4, timesteps=2, latents="noise")
    seen: list[tuple[int, int]] = []

    def on_progress(progress):
        if progress.what == block_polish.WHAT:
            seen.append((progress.done, progress.total))

    settings = {"block_steps": 3}
    merge_loras(host, concepts, settings=settings, calibration=calibration, on_progress=on_progress)
    total = seen[0][1]
    assert sorted({done for done, _ in seen}) == list(range(total + 1))
    assert seen == sorted(seen)
    seen.clear()

    def until_two(progress):
        on_progress(progress)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_loras(
            host, concepts, settings=settings, calibration=calibration, on_progress=until_two
        )
    assert all(p.grad is None for p in host.pipeline.unet.parameters())
    assert all(not m._forward_pre_hooks for m in host.pipeline.unet.modules())


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("name", ["Z-Image", "Wan 2.2 with two experts"])
def test_polish_of_other_architectures(name, tmp_path):
    """Their blocks are found, give alone what they gave within the model, and come closer."""
    host, concepts = two_concepts(PIPELINES[name](), tmp_path)
    calibration = Calibration(samples=4, timesteps=2, denoising_steps=2)
    plain, polished = (
        merge_loras(host, concepts, settings={"block_steps": steps}, calibration=calibration)
        for steps in (0, 10)
    )
    moved = [
        site
        for site, change in plain.lora.sites.items()
        if not torch.equal(change.up, polished.lora.sites[site].up)
    ]
    assert moved
    assert all(change.up.isfinite().all() for change in polished.lora.sites.values())
