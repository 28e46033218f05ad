"""What the training steps share: threads, progress, checkpoints, schedules, moving averages."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import draw

log = logging.getLogger(__name__)


def to_tensor(images: Iterable) -> Tensor:
    """Pictures as (N, 3, H, W) float32 in [-1, 1]."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def bf16():
    """CPU autocast to bfloat16, which halves the time of a step."""
    return torch.autocast("cpu", torch.bfloat16)


def one_cycle(optimizer: torch.optim.Optimizer, peak: float, steps: int):
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=steps + 1, pct_start=0.05, final_div_factor=100.0
    )


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
    """A resumable training run in `folder`: modules, optimizer and averages as safetensors.

    A run is deterministic between checkpoints: the data of step i depend on the seed and i only.
    """

    def __init__(
        self,
        folder: Path,
        modules: dict[str, nn.Module],
        optimizer,
        average: Average,
        steps: int,
        peak: float,
        seed: int,
    ):
        self.folder, self.modules, self.optimizer = folder, modules, optimizer
        self.average, self.steps, self.peak, self.seed = average, steps, peak, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.start, self.seconds = 0, 0.0
        if (folder / "state.json").exists():
            self._load()
        self.scheduler = one_cycle(optimizer, peak, steps)
        for _ in range(self.start):
            self.scheduler.step()
        self._began = time.time()

    def generators(self, step: int) -> tuple[np.random.Generator, torch.Generator]:
        seed = self.seed * 1_000_003 + step
        return np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def descend(self, step: int, loss: Tensor, clip: float = 1.0) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.average.parameters, clip, foreach=True)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(step)

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
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{i}.{key}"] = value
        tensors = {
            k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()
        }
        save_file(tensors, self.folder / "new.safetensors")
        os.replace(self.folder / "new.safetensors", self.folder / "state.safetensors")
        state = {"step": step, "seconds": round(self.elapsed, 1)}
        (self.folder / "state.json").write_text(json.dumps(state))

    def _load(self) -> None:
        state = json.loads((self.folder / "state.json").read_text())
        self.start, self.seconds = state["step"], state["seconds"]
        tensors = load_file(self.folder / "state.safetensors")
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
                self.optimizer.state[parameter] = {
                    k: torch.empty_like(parameter).copy_(v) if v.shape == parameter.shape else v
                    for k, v in kept.items()
                }
        log.info("resumed %s at step %d", self.folder, self.start)


def random_pictures(rng: np.random.Generator, count: int, patterned: float, two: float):
    """`count` random scenes and their pictures as a tensor."""
    scenes = [draw.random_scene(rng, patterned, two) for _ in range(count)]
    return scenes, to_tensor(draw.draw(scene, rng) for scene in scenes)
