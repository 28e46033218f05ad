"""Settings declared once: checks, text, presets, and the page that lists them."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
import rivals  # noqa: F401 (registers them)
from oracle import ModuleHost, Net, difference, jacobi, make_data, make_lora
from small_merge import merge

from iteris_core import (
    Calibration,
    Concept,
    IterisSettings,
    SettingsError,
    all_methods,
    merge_loras,
)
from iteris_core.cli.options import Dtype, parse_settings
from iteris_core.lora_files import DTYPES
from iteris_core.methods.elected_signs import TiesSettings
from iteris_core.methods.registry import settings_over
from iteris_core.settings import PRESETS, Settings, declared_settings, setting

pytestmark = pytest.mark.usefixtures("unmeasured")

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Example(Settings):
    on: bool = setting(True, "A switch.")
    count: int = setting(3, "A number.", low=1)
    share: float = setting(0.5, "A share.", above=0, high=1)
    most: int | float | None = setting(None, "A rank.", low=1)
    rows: int | Literal["all"] | None = setting(None, "Rows.", low=1)
    word: Literal["one", "two", "none"] = setting("one", "A word.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on": 1}, "on must be true or false, not 1"),
        ({"on": "yes"}, "on must be true or false, not 'yes'"),
        ({"count": 2.5}, "count must be a whole number, at least 1, not 2.5"),
        ({"count": "abc"}, "count must be a whole number, at least 1, not 'abc'"),
        ({"count": True}, "count must be a whole number, at least 1, not True"),
        ({"count": None}, "count must be a whole number"),
        ({"count": 0}, "count must be at least 1, not 0"),
        ({"share": 0}, r"share must be in \(0, 1\], not 0"),
        ({"share": float("nan")}, r"share must be in \(0, 1\], not nan"),
        ({"share": [1]}, "share must be"),
        ({"most": 2.0}, r"a whole number, .* \(or a share between 0 and 1, or none\)"),
        ({"rows": "some"}, r"rows must be .* \(or all, or none\)"),
        ({"word": "three"}, "word must be one of one, two, none, not 'three'"),
        ({"word": None}, "word must be one of"),
        ({"other": 1}, "no setting 'other'. The settings are on, count"),
    ],
)
def test_a_wrong_value_names_the_setting_and_what_is_allowed(values, message):
    with pytest.raises(SettingsError, match=message):
        Example.from_mapping(values)


def test_the_constructor_checks_as_a_mapping_does():
    with pytest.raises(SettingsError, match="count must be a whole number"):
        Example(count=True)
    with pytest.raises(SettingsError, match="samples must be a whole number"):
        Calibration(samples=2.5)
    for value in (2.5, "abc", True, 0):
        with pytest.raises(SettingsError, match="micro_batch must be"):
            IterisSettings(micro_batch=value)
    assert Example.from_mapping({"on": False, "word": "one"}) == Example(on=False)


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        *((f"on={text}", False) for text in ("False", "false", "no", "off", "0")),
        *((f"on={text}", True) for text in ("True", "yes", "ON", "1")),
        *((f"most={text}", None) for text in ("none", "None", "null", "")),
        ("most=8", 8),
        ("most=0.9", 0.9),
        ("share=1e-3", 1e-3),
        ("rows=all", "all"),
        ("rows=5", 5),
        ("word=none", "none"),
        ("word=Two", "two"),
        ("on=no", False),
    ],
)
def test_text_becomes_a_value(pair, value):
    values, _ = parse_settings(Example, [pair])
    assert list(values.values()) == [value]
    assert type(next(iter(values.values()))) is type(value)
    Example.from_mapping(values)


def test_calibration_is_set_in_the_same_way():
    pairs = ["repair=False", "guidance=2.5", "denoising_steps=20"]
    settings, calibration = parse_settings(IterisSettings, pairs)
    assert settings == {"repair": False}
    assert calibration == {"guidance": 2.5, "denoising_steps": 20}


@pytest.mark.parametrize("value", [5, 0, "size"])
@pytest.mark.parametrize("name", ["tolerance", "pull", "block_rate"])
def test_no_unknown_setting_is_accepted(name, value):
    with pytest.raises(SettingsError, match=f"there is no setting '{name}'"):
        IterisSettings.from_mapping({name: value})


def test_numbers_of_numpy_are_numbers():
    calibration = Calibration(samples=np.int64(10), class_words=np.float32(0.5))
    assert (calibration.samples, calibration.class_words) == (10, 0.5)
    assert {type(calibration.samples), type(calibration.class_words)} == {int, float}
    with pytest.raises(SettingsError, match="samples must be at least 1, not 0"):
        Calibration(samples=np.int64(0))
    json.dumps(asdict(IterisSettings(rank=np.int32(8))))


def test_every_setting_of_every_method_is_declared_and_its_default_is_allowed():
    for owner in {method.settings for method in all_methods()} | {Calibration}:
        declared = declared_settings(owner)
        assert {f.name for f in fields(owner)} - set(declared) <= {"templates"}
        for one in declared.values():
            assert one.help.endswith(".")
            assert bool(one.none) == one.optional
            assert one.parse(one.shown(one.default)) == one.default
        owner()


def test_the_page_of_settings_is_up_to_date():
    """``python benchmarks/reference_pages.py``, in a process without the rivals."""
    script = "import reference_pages as r; print(r.settings_page(), end='')"
    path = f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", script]
    page = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page.stdout


def test_choices_that_typer_needs_as_types():
    assert set(get_args(Dtype)) == set(DTYPES)


def test_presets_are_settings():
    for name, preset in PRESETS.items():
        iteris = IterisSettings.from_mapping(preset.settings)
        calibration = Calibration.from_mapping(preset.calibration)
        assert settings_over(name, "iteris", None, None) == (iteris, calibration)
        assert settings_over(name, "ties", None, None) == (TiesSettings(), calibration)
    with pytest.raises(
        SettingsError, match="preset must be one of default, fast, best, tidy, paper"
    ):
        merge_loras(None, [Concept(make_lora(1))], "sum", preset="quick")


@pytest.mark.parametrize("count", [2, 3])
def test_the_preset_paper_is_algorithm_1(count):
    """Against the dense transcription: every token, λ of eq. 8, the ridge of eq. 7, 20 times."""
    loras = [make_lora(seed, rank=1 + seed) for seed in range(1, count + 1)]
    data = make_data(count)
    result = merge_loras(
        ModuleHost(Net(), data),
        [Concept(lora, prompts=["unused"]) for lora in loras],
        preset="paper",
        settings={"precision": "float64"},
    )
    dense = jacobi(
        Net(), loras, data, iterations=20, objective="adapter", ridge=1e-4, weighting="adapter"
    )
    assert difference(result.lora, dense) < 1e-8
    assert not any(site.repair for site in result.report.sites.values())
    assert len(result.report.convergence) == 19


def test_the_report_says_whether_iterations_converged():
    loras, data = [make_lora(1), make_lora(2)], make_data()
    settings = {"schedule": "jacobi", "ridge": 1e-3, "objective": "adapter"}
    stopped = merge(loras, data, iterations=50, **settings).report
    assert stopped.converged is True
    assert len(stopped.convergence) == 49
    assert f"Converged after {len(stopped.convergence) + 1} iterations" in stopped.summary()
    assert stopped.to_dict()["converged"] is True
    early = merge(loras, data, iterations=2, **settings).report
    assert early.converged is False
    assert "Not converged: after 2 iterations" in early.summary()
    assert merge(loras, data).report.converged is None
    assert "onverge" not in merge(loras, data).report.summary()
