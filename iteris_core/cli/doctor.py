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
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..activations.meter import free_memory
from .base import best_device
from .common import option

PACKAGE = "comfyui-iteris"
NEEDS = {
    "torch": "everything",
    "safetensors": "everything",
    "greenlet": "merging by features (iteris, regmean, ssr, …)",
    "diffusers": "bases that draw pictures: merge, compare",
    "transformers": "text encoders, and models of text: merge, compare",
    "peft": "loading a merged LoRA: compare, demo; adapters of models of text",
    "accelerate": "--offload, and merging in several processes",
    "open_clip_torch": "CLIP scores: score, compare, demo",
    "matplotlib": "--plot, and plots of the nodes",
    "psutil": "planning memory on a CPU",
    "PyYAML": "merge files",
}
"""What a package is for."""


@dataclass(frozen=True)
class Finding:
    """A package: what is there, and what is wanted (None: not known here, or nothing)."""

    name: str
    version: str | None
    wanted: str | None
    purpose: str

    @property
    def trouble(self) -> str:
        if self.version is None:
            return f"missing, for {self.purpose}"
        if self.wanted is not None and not _within(self.version, self.wanted):
            return f"must be {self.wanted}, for {self.purpose}"
        return ""


def doctor(as_json: Annotated[bool, option("Print everything as JSON", "--json")] = False) -> None:
    """Show versions, the device and its free memory, and what is missing for what."""
    wanted = _wanted()
    findings = [Finding(n, version_of(n), wanted.get(n.lower()), why) for n, why in NEEDS.items()]
    trouble = {one.name: one.trouble for one in findings if one.trouble}
    facts = _facts()
    if as_json:
        packages = [asdict(one) for one in findings]
        typer.echo(json.dumps({**facts, "packages": packages, "trouble": trouble}))
    else:
        console = Console()
        console.print(_table(facts, findings))
        for name, what in trouble.items():
            console.print(f"[bold red]{name}[/] {what}", highlight=False)
        if trouble:
            names = " ".join(f"'{name}{wanted.get(name.lower()) or ''}'" for name in trouble)
            console.print(f"pip install {names}", highlight=False, soft_wrap=True, markup=False)
        else:
            console.print("Nothing is missing.")
    raise typer.Exit(1 if trouble else 0)


def _facts() -> dict[str, Any]:
    device = torch.device(best_device())
    found: dict[str, Any] = {
        "iteris": version_of(PACKAGE) or "from a checkout",
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    with suppress(ImportError):  # psutil: then it stands among what is missing
        places = {"device": device, "host": torch.device("cpu")} if device.type != "cpu" else {}
        for name, place in (places or {"host": device}).items():
            found[f"free memory of the {name}"] = f"{free_memory(place) / 2**30:.1f} GiB"
    found["free on disk here"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"
    toybox = importlib.util.find_spec("toybox") is not None
    found["toybox, for iteris demo"] = "there" if toybox else "not installed"
    return found


def _table(facts: dict[str, Any], findings: list[Finding]) -> Table:
    table = Table("what", "is", "for")
    for name, value in facts.items():
        table.add_row(name, str(value), "")
    table.add_section()
    for one in findings:
        style = "bold red" if one.trouble else None
        table.add_row(one.name, one.version or "missing", one.purpose, style=style)
    return table


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _wanted() -> dict[str, str]:
    """Package → versions that this one declares; nothing from a checkout that is not installed."""
    try:
        declared = requires(PACKAGE) or []
    except PackageNotFoundError:
        return {}
    found = [re.match(r"([\w.-]+)\s*([^;\[]*)", line) for line in declared]
    return {one[1].lower(): one[2].strip() for one in found if one is not None and one[2].strip()}


def _within(have: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(have, prereleases=True)
