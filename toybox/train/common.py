"""Shared by the training steps: threads, progress, checkpoints, schedules, moving averages."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import draw

log = logging.getLogger(__name__)


def to_tensor(images: Iterable) -> Tensor:
    """Pictures as (N, 3, H, W) float32 in [-1, 1]."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def bf16():
    """CPU autocast to bfloat16 where the CPU computes in it, which halves the time of a step; where
    it does not, a step would take three times as long."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def one_cycle(optimizer: torch.optim.Optimizer, peak: float, steps: int):
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=steps + 1, pct_start=0.05, final_div_factor=100.0
    )


def made_once(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of the file at `path`, which are those of `make` unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(make(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        log.info("made %s", path)
    return load_file(path)


class Average:
    """Exponential moving average of a module's parameters, warmed up."""

    def __init__(self, modules: Iterable[nn.Module], decay: float = 0.998):
        self.parameters = [p for m in modules for p in m.parameters()]
        self.shadow = [p.detach().clone() for p in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages; call again to undo."""
        for p, s in zip(self.parameters, self.shadow, strict=True):
            kept = p.detach().clone()
            p.copy_(s)
            s.copy_(kept)


class Run:
    """A resumable training run in `folder`: modules, optimizers and averages as safetensors.

    A run is deterministic between checkpoints: the data of step i depend on the seed and i only.
    A checkpoint is one file, with its step in the metadata, that appears only when complete.
    """

    def __init__(
        self,
        folder: Path,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        average: Average,
        steps: int,
        peak: float,
        seed: int,
        schedule: Callable[[torch.optim.Optimizer, float, int], Any] = one_cycle,
    ):
        self.folder, self.modules = folder, modules
        self.optimizers = (
            [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        )
        self.average, self.steps, self.peak, self.seed = average, steps, peak, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.start, self.seconds = 0, 0.0
        if (folder / "state.safetensors").exists():
            self._load()
        self.schedules = [schedule(some, peak, steps) for some in self.optimizers]
        for _ in range(self.start):
            self.advance()
        self._began = time.time()

    def generators(self, step: int) -> tuple[np.random.Generator, torch.Generator]:
        seed = self.seed * 1_000_003 + step
        return np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def descend(self, step: int, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.average.parameters, 1.0, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.advance()
        self.average.update(step)

    def advance(self) -> None:
        """One step along the schedules of the learning rates."""
        for schedule in self.schedules:
            schedule.step()

    @property
    def elapsed(self) -> float:
        return self.seconds + time.time() - self._began

    def save(self, step: int) -> None:
        tensors = {}
        for name, module in self.modules.items():
            tensors |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
        for i, (parameter, shadow) in enumerate(
            zip(self.average.parameters, self.average.shadow, strict=True)
        ):
            tensors[f"average.{i}"] = shadow
            for key, value in self._optimizer_of(parameter).state.get(parameter, {}).items():
                tensors[f"optimizer.{i}.{key}"] = value
        tensors = {
            k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()
        }
        told = {"step": str(step), "seconds": f"{self.elapsed:.1f}"}
        save_file(tensors, self.folder / "new.safetensors", metadata=told)
        os.replace(self.folder / "new.safetensors", self.folder / "state.safetensors")

    def _optimizer_of(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        return next(
            optimizer
            for optimizer in self.optimizers
            if any(parameter is p for group in optimizer.param_groups for p in group["params"])
        )

    def _load(self) -> None:
        path = self.folder / "state.safetensors"
        with safe_open(path, "pt") as file:
            self.seconds = float(file.metadata()["seconds"])
        self.start = step_of(path)
        tensors = load_file(path)
        for name, module in self.modules.items():
            prefix = f"{name}."
            module.load_state_dict(
                {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            )
        for i, parameter in enumerate(self.average.parameters):
            self.average.shadow[i].copy_(tensors[f"average.{i}"])
            prefix = f"optimizer.{i}."
            kept = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            if kept:  # laid out in memory as the parameter is
                self._optimizer_of(parameter).state[parameter] = {
                    k: torch.empty_like(parameter).copy_(v) if v.shape == parameter.shape else v
                    for k, v in kept.items()
                }
        log.info("resumed %s at step %d", self.folder, self.start)


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def random_pictures(rng: np.random.Generator, count: int, patterned: float, two: float):
    """`count` random scenes and their pictures as a tensor."""
    scenes = [draw.random_scene(rng, patterned, two) for _ in range(count)]
    return scenes, to_tensor(draw.draw(scene, rng) for scene in scenes)
