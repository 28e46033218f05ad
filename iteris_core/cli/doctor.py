"""``iteris doctor``"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Annotated

import torch
import typer

from ..activations.memory import free_memory
from .base import device_of
from .common import option, print_table

PACKAGE = "iteris-lora"
NEEDS = {
    "torch": "everything",
    "safetensors": "everything",
    "greenlet": "merging by features (iteris, regmean, ssr, …)",
    "diffusers": "image bases: merge, compare",
    "transformers": "text encoders and language models: merge, compare",
    "peft": "loading a merged LoRA: compare, demo; adapters of language models",
    "accelerate": "--offload",
    "open_clip_torch": "CLIP scores: score, compare, demo",
    "matplotlib": "inspect --plot, and plots of the nodes",
    "psutil": "planning memory on a CPU",
    "PyYAML": "merge files",
}
"""Package → its purpose."""


@dataclass(frozen=True)
class Finding:
    """A package: its installed version, and the required one (None: unknown or not needed)."""

    name: str
    version: str | None
    wanted: str | None
    purpose: str

    @property
    def trouble(self) -> str:
        if self.version is None:
            return f"missing, for {self.purpose}"
        from packaging.specifiers import SpecifierSet

        if self.wanted is not None and not SpecifierSet(self.wanted).contains(self.version, True):
            return f"must be {self.wanted}, for {self.purpose}"
        return ""


def doctor(as_json: Annotated[bool, option("Print everything as JSON", "--json")] = False) -> None:
    """Show versions, the device and its free memory, and anything that is missing."""
    needed = _wanted()
    findings = [Finding(n, version_of(n), needed.get(n.lower()), why) for n, why in NEEDS.items()]
    trouble = {one.name: one.trouble for one in findings if one.trouble}
    facts = _facts()
    if as_json:
        packages = [asdict(one) for one in findings]
        typer.echo(json.dumps({**facts, "packages": packages, "trouble": trouble}))
    else:
        rows = [(name, value, "") for name, value in facts.items()]
        rows += [(one.name, one.version or "missing", one.purpose) for one in findings]
        print_table(("what", "is", "for"), rows)
        for name, what in trouble.items():
            typer.secho(f"{name} {what}", fg="red", bold=True)
        names = " ".join(f"'{name}{needed.get(name.lower()) or ''}'" for name in trouble)
        typer.echo(f"pip install {names}" if trouble else "Nothing is missing.")
    raise typer.Exit(1 if trouble else 0)


def _facts() -> dict[str, str]:
    device = torch.device(device_of())
    facts = {
        "iteris": version_of(PACKAGE) or "from a checkout",
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    with suppress(ImportError):  # psutil, which is then listed as missing
        places = {"device": device, "host": torch.device("cpu")} if device.type != "cpu" else {}
        for name, place in (places or {"host": device}).items():
            facts[f"free memory of the {name}"] = f"{free_memory(place) / 2**30:.1f} GiB"
    facts["free on disk here"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"
    toybox = importlib.util.find_spec("toybox") is not None
    facts["toybox, for iteris demo"] = "there" if toybox else "not installed"
    return facts


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _wanted() -> dict[str, str]:
    """Package → versions that this project requires; empty for a checkout that is not installed."""
    try:
        declared = requires(PACKAGE) or []
    except PackageNotFoundError:
        return {}
    matches = [re.match(r"([\w.-]+)\s*([^;\[]*)", line) for line in declared]
    return {one[1].lower(): one[2].strip() for one in matches if one is not None and one[2].strip()}
