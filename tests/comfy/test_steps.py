"""Steps through the whole denoiser, on ComfyUI's classes as its nodes load them: in inference mode,
quantised, half in host memory; and what they leave of a MODEL."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from figures import Trial
from gradient_check import check_gradients
from kit import part
from reduced_models import ARCHITECTURES
from test_base import quantised

FAST = "SD 1.5", "FLUX.1"
SLOW = "SDXL", "SD 3.5 medium", "FLUX.2", "Z-Image", "Wan 2.2 14B", "Qwen-Image", "LTX-Video"


def checked(pack, monkeypatch, merge):
    kind = part(pack, "iteris_core.methods.row_gradients").RowGradients
    thresholds = part(pack, "iteris_core.solve.choose").THRESHOLDS
    with torch.inference_mode():
        return check_gradients(monkeypatch, kind, thresholds, merge)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_gradients_are_right_where_blocks_change_tensors_in_place(
    pack, tmp_path, monkeypatch, name
):
    trial = Trial(pack, ARCHITECTURES[name], tmp_path)

    def merge(thresholds):
        given = trial.merging.merge_on.__kwdefaults__
        monkeypatch.setitem(given, "thresholds", thresholds)
        return trial.merge(2, steps=1)

    notes = checked(pack, monkeypatch, merge).report.notes["steps"]
    assert sum(note.endswith(": 1 taken") for note in notes) == len(trial.models)
    assert trial.unchanged()


@pytest.mark.parametrize("form", ["float8_e4m3fn", "nvfp4"])
def test_quantised_layers(kit, monkeypatch, form):
    kit.calibration = dataclasses.replace(kit.calibration, latents="noise")
    on = quantised(kit, form)
    checked(
        kit.pack, monkeypatch, lambda chosen: kit.merge({"steps": 1}, on=on, thresholds=chosen)
    )
