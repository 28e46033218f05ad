"""A wheel holds everything that is read once it is installed, and nothing that is not ours."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("iteris_core", "toybox")
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools leaves its own files beside the sources."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-c", BUILD, str(built)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return built / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_its_packages(wheel):
    names = set(ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"toybox/templates.txt", "toybox/world.json", "iteris_core/py.typed"} <= wanted
    assert not wanted - names
    assert {name.split("/")[0] for name in names - wanted} == {
        next(name.split("/")[0] for name in names if name.endswith("/METADATA"))
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_what_the_demo_reads_is_there_once_a_wheel_is_installed(wheel, tmp_path):
    ZipFile(wheel).extractall(tmp_path / "installed")
    script = """
import toybox.demo
from toybox import BASE, concepts, load_clip, load_judge, load_pipeline
assert toybox.demo.TEMPLATES
assert (toybox.ROOT / "render.py").is_file()
load_pipeline(), load_clip(), load_judge()
for concept in concepts().values():
    assert concept.lora.is_file() and concept.references
print(toybox.ROOT)
"""
    command = [sys.executable, "-c", script]
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(tmp_path / "installed" / "toybox")
