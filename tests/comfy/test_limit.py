"""A memory limit, and what a measurement of held-out rows raises, on ComfyUI's MODEL and CLIP."""

from dataclasses import replace

import pytest
from kit import part


@pytest.mark.parametrize("mib", [24, 32])
def test_samples_and_held_out_rows_keep_the_limit(kit, mib):
    meter = part(kit.pack, "iteris_core.activations.memory").MemoryMeter
    kit.calibration = replace(kit.calibration, samples=16, guidance=3.0)
    kit.merge()  # the models are loaded
    with meter() as counted:
        result = kit.merge(memory_budget=mib << 20)
    assert counted.peak <= 1.05 * (mib << 20)
    assert result.report.kept


@pytest.mark.parametrize("error", ["TypeError", "interrupt"])
def test_a_measurement_ends_a_merge_only_if_the_user_cancels(kit, monkeypatch, error):
    import comfy.model_management as memory

    def under(*_):
        raise TypeError("broken") if error == "TypeError" else memory.InterruptProcessingException

    held_out = part(kit.pack, "iteris_core.passes.held_out")
    monkeypatch.setattr(held_out.FinalOutputs, "under", under)
    if error == "interrupt":
        with pytest.raises(memory.InterruptProcessingException):
            kit.merge()
    else:
        assert kit.merge().report.notes["held-out rows"] == ["not measured: broken"]
