"""Wheel, source distribution and registry archive contain everything needed after installation, and
nothing from outside the project."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, for which pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGES = ("iteris_core", "toybox")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIMIT = 35e6
"""Bytes that an installation may take."""
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def build(source: Path, what: str, target: Path) -> Path:
    """``build_wheel`` or ``build_sdist``, with the setuptools that is here."""
    command = [sys.executable, "-c", BUILD, what, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy, since setuptools leaves its own files beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    (source / "tests").mkdir()
    shutil.copy(__file__, source / "tests")
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build(source, "build_wheel", tmp_path_factory.mktemp("built"))


def run(installed: Path, *words: str) -> str:
    """What Python prints that knows nothing but the wheel."""
    environment = {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "PATH": ""}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, *words]
    done = subprocess.run(
        command, cwd=installed.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


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
    assert wheel.stat().st_size < LIMIT


@pytest.mark.slow
def test_the_wheel_of_a_source_distribution_is_the_same(source, wheel, tmp_path):
    sdist = build(source, "build_sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert not (unpacked / "tests").exists()
    again = build(unpacked, "build_wheel", tmp_path)
    assert set(ZipFile(again).namelist()) == set(ZipFile(wheel).namelist())
    assert sdist.stat().st_size < LIMIT


@pytest.mark.slow
def test_what_the_demo_reads_is_there_once_a_wheel_is_installed(wheel, tmp_path):
    ZipFile(wheel).extractall(tmp_path / "installed")
    script = """
import toybox.demo
from toybox import BASE, concepts, load_clip, load_judge, load_pipeline
assert toybox.TEMPLATES
assert (toybox.ROOT / "render.py").is_file()
load_pipeline(), load_clip(), load_judge()
for concept in concepts().values():
    assert concept.lora.is_file() and concept.references
print(toybox.ROOT)
"""
    found = run(tmp_path / "installed", "-c", script)
    assert found.strip() == str(tmp_path / "installed" / "toybox")


@pytest.mark.slow
def test_iteris_merge_runs_once_a_wheel_is_installed(wheel, tmp_path):
    installed = tmp_path / "installed"
    ZipFile(wheel).extractall(installed)
    loras = [installed / "toybox" / "weights" / "loras" / f"sks{n}.safetensors" for n in (1, 6)]
    out = tmp_path / "both.safetensors"
    command = ["-m", "iteris_core", "merge"]
    command += [str(installed / "toybox" / "weights" / "base"), "-o", str(out)]
    command += [
        f"--concept={lora}:{lora.stem}:{kind}"
        for lora, kind in zip(loras, ("star", "square"), strict=True)
    ]
    command += ["--samples=1", "--timesteps=1", "--latents=noise", "--latent-size=4"]
    run(installed, *command)
    assert b"iteris" in out.read_bytes()[:100_000]
    assert str(tmp_path).encode() not in out.read_bytes()


def git(*arguments: str) -> list[str]:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("not a checkout of git")
    return done.stdout.splitlines()


def test_what_the_registry_hands_out():
    """As comfy-cli packs it: what git tracks, without what ``.comfyignore`` names."""
    tracked = {name for name in git("ls-files") if (ROOT / name).is_file()}
    handed = tracked - set(git("ls-files", "-ci", "--exclude-from=.comfyignore"))
    folders = {name.split("/")[0] for name in handed if "/" in name}
    ours = {"iteris_core", "locales", "nodes", "subgraphs", "toybox", "web", "workflows"}
    assert folders == ours
    assert {"__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt"} <= handed
    assert {f"toybox/{name}" for name in ("world.json", "demo.py", "templates.txt")} <= handed
    assert any(name.startswith("toybox/weights/base/unet/") for name in handed)
    assert not any(name.startswith("toybox/train/") for name in handed)
    assert sum((ROOT / name).stat().st_size for name in handed) < LIMIT


def test_the_lists_of_packages_agree():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert sorted(listed) == sorted(PROJECT["dependencies"])
    # Nothing that ComfyUI brings itself is asked for with its nodes.
    names = {re.split(r"[\[<>=!; ]", line)[0].lower() for line in PROJECT["dependencies"]}
    assert not names & {"torch", "diffusers", "transformers", "safetensors", "numpy", "pillow"}
    assert "iteris-lora[cli,score]" in PROJECT["optional-dependencies"]["dev"]


def test_the_version_is_in_the_changelog_and_the_licence_is_one_of_spdx():
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
