"""ComfyUI's models run block by block: their blocks change arguments in place, and read options
that the sampler hands on."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from figures import Trial, relative
from reduced_models import ARCHITECTURES

FAST = ("SD 1.5", "SDXL", "FLUX.1", "Z-Image", "Qwen-Image", "Wan 2.1")
NAMES = [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
    for name, reduced in ARCHITECTURES.items()
    if reduced.settings.get("schedule") != "jacobi" and not reduced.experts
]


@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_is_the_same(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    reduced = ARCHITECTURES[name]
    sweep, strategies, plan = (
        importlib.import_module(f"{pack.__name__}.iteris_core.passes.{some}")
        for some in ("sweep", "strategies", "plan")
    )
    trial = Trial(pack, reduced, tmp_path)
    wanted = trial.merge(2).lora.sites
    replayed: dict[str, int] = {}

    def planned(run: Any, stage: Any, _: Any, batching: Any, **__: Any) -> Any:
        if not stage.sites:
            return plan.Plan(stage, batching.rows, strategies.Strategy())
        barriers = strategies.find(stage, run.lockstep).barriers(strategies.POLICY.blocks[-1])
        barriers = strategies.replayable(stage, run.lockstep, barriers)
        replayed[stage.name] = len(barriers.blocks)
        return plan.Plan(stage, batching.rows, strategies.Strategy(barriers=barriers))

    monkeypatch.setattr(sweep, "planned", planned)
    found = trial.merge(2).lora.sites
    assert min(replayed.values()) > 0, replayed
    apart = [relative(found[s].dense() - c.dense(), c.dense()) for s, c in wanted.items()]
    assert max(apart) < 5e-3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trial.model.model.modules())
