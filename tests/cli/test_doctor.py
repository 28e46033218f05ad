"""``iteris doctor`` shows what is installed, and what is missing."""

import json
import sys
from importlib.metadata import PackageNotFoundError

from command_line import run

import iteris_core.cli

doctor = sys.modules["iteris_core.cli.about"]


def test_nothing_is_missing_here(monkeypatch, capsys):
    code, text, _ = run(monkeypatch, capsys, "doctor", "--json")
    data = json.loads(text)
    assert code == 0
    assert data["trouble"] == {}
    assert data["device"]
    assert float(data["free memory of the host"].split()[0]) > 0
    assert {"torch", "diffusers", "PyYAML"} < data["packages"].keys()
    code, text, _ = run(monkeypatch, capsys, "doctor")
    assert code == 0
    assert "Nothing is missing." in text


def test_what_is_missing_or_too_old_is_named_with_its_purpose(monkeypatch, capsys):
    def version(name):
        if name == "open_clip_torch":
            raise PackageNotFoundError(name)
        return {"diffusers": "0.20.0"}.get(name, "99.0")

    declared = ["diffusers>=0.36; extra == 'cli'", "open-clip-torch", "x[cli]; extra == 'dev'"]
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", lambda name: declared)
    code, text, _ = run(monkeypatch, capsys, "doctor", "--json")
    assert code == 1
    assert json.loads(text)["trouble"] == {
        "diffusers": "must be >=0.36, for image bases: merge, compare",
        "open_clip_torch": "missing, for CLIP scores: score, compare, demo",
    }
    code, text, _ = run(monkeypatch, capsys, "doctor")
    assert code == 1
    assert "pip install 'diffusers>=0.36' 'open_clip_torch'" in text


def test_from_a_checkout_that_is_not_installed(monkeypatch, capsys):
    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", none)
    assert doctor._wanted() == {}
    assert iteris_core.cli.doctor is doctor.doctor
