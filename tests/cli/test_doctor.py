"""``iteris doctor`` shows what is installed, and what is missing."""

import json
import sys
from importlib.metadata import PackageNotFoundError

import iteris_core.cli

doctor = sys.modules["iteris_core.cli.about"]


def test_nothing_is_missing_here(iteris):
    data = json.loads(iteris("doctor", "--json"))
    assert data["trouble"] == {}
    assert data["device"]
    assert float(data["free memory of the host"].split()[0]) > 0
    assert {"torch", "diffusers", "PyYAML"} < data["packages"].keys()
    assert "Nothing is missing." in iteris("doctor")


def test_what_is_missing_or_too_old_is_named_with_its_purpose(iteris, monkeypatch):
    def version(name):
        if name == "open_clip_torch":
            raise PackageNotFoundError(name)
        return {"diffusers": "0.20.0"}.get(name, "99.0")

    declared = ["diffusers>=0.36; extra == 'cli'", "open-clip-torch", "x[cli]; extra == 'dev'"]
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", lambda name: declared)
    code, text, _ = iteris.run("doctor", "--json")
    assert code == 1
    assert json.loads(text)["trouble"] == {
        "diffusers": "must be >=0.36, for image bases: merge, compare",
        "open_clip_torch": "missing, for CLIP scores: score, compare, demo",
    }
    code, text, _ = iteris.run("doctor")
    assert code == 1
    assert "pip install 'diffusers>=0.36' 'open_clip_torch'" in text


def test_from_a_checkout_that_is_not_installed(monkeypatch, capsys):
    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", none)
    assert doctor._wanted() == {}
    assert iteris_core.cli.doctor is doctor.doctor
