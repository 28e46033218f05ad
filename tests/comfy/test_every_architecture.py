"""Every architecture of ComfyUI: a merge of one LoRA draws what the stock loader draws with it, the
number of rows in a forward does not matter, and the saved file is what the node hands on.

With ``WRITE_RESULTS=1`` the figures go into benchmarks/results/architectures.json.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType

import pytest
from architecture_results import record
from figures import Trial
from reduced_models import ARCHITECTURES
from two_experts import Experts

NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if reduced.slow else [])
    for name, reduced in ARCHITECTURES.items()
]


@pytest.mark.parametrize("name", NAMES)
def test_a_merge(pack: ModuleType, tmp_path: Path, name: str) -> None:
    import comfyui_version

    reduced = ARCHITECTURES[name]
    trial = (Experts if reduced.experts else Trial)(pack, reduced, tmp_path)
    alone = trial.alone()
    rows, file = trial.rows_and_file()
    assert not any(m._forward_hooks for m in trial.model.model.modules())
    assert not any(m._forward_hooks for m in trial.clip.cond_stage_model.modules())
    remarks = {
        "left_out": reduced.left_out,
        "settings": ", ".join(f"{name}={value}" for name, value in reduced.settings.items()),
    }
    remarks = {key: text for key, text in remarks.items() if text}
    version = comfyui_version.__version__
    laws = {"alone": alone, "rows": rows, "file": file}
    record("comfyui", name, version, **laws, drift=trial.drift, **remarks)
    assert alone < 1e-3
    assert rows < 5e-3
    assert file < 1e-3


UNSEEN = [
    name for name, some in ARCHITECTURES.items() if some.apart and "inputs" not in some.left_out
]


@pytest.mark.parametrize("name", UNSEEN)
def test_what_is_left_out_is_told_with_its_file(
    pack: ModuleType, tmp_path: Path, name: str
) -> None:
    """Layers that cannot be merged, in a LoRA that changes them."""
    reduced = ARCHITECTURES[name]
    trial = Trial(pack, dataclasses.replace(reduced, apart=()), tmp_path)
    with pytest.raises(trial.core.IterisError, match=r"1\.safetensors") as error:
        trial.merge(1)
    assert any(part.rstrip(".") in str(error.value) for part in reduced.apart)


def test_a_class_that_nothing_names(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tomorrow's: its classes have other names than today's, and there is no architecture at all
    that it could be taken for."""
    architectures = importlib.import_module(f"{pack.__name__}.iteris_core.architectures")
    monkeypatch.setattr(architectures, "_registered", ())
    trial = Trial(pack, ARCHITECTURES["Z-Image"], tmp_path)
    model = trial.model.model
    for thing in (model, model.diffusion_model, model.model_config):
        thing.__class__ = type("Tomorrow", (type(thing),), {})
    model.model_config.unet_config["image_model"] = "tomorrow"
    assert trial.alone() < 1e-3
    rows, file = trial.rows_and_file()
    assert rows < 5e-3
    assert file < 1e-3
