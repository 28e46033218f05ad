"""``iteris doctor``"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version

import torch
import typer

from ..activations.memory import free_memory
from .base import device_of
from .common import print_table
from .options import AsJson

PACKAGE = "iteris-lora"
NEEDS = {
    "torch": "everything",
    "safetensors": "everything",
    "greenlet": "merging by features (iteris, regmean, ssr, …)",
    "diffusers": "image bases: merge, compare",
    "transformers": "text encoders: merge, compare",
    "peft": "loading a merged LoRA: compare, demo",
    "accelerate": "--offload",
    "open_clip_torch": "CLIP scores: score, compare, demo",
    "matplotlib": "inspect --plot, and plots of the nodes",
    "psutil": "planning memory on a CPU",
    "PyYAML": "merge files",
}
"""Package → its purpose."""


def doctor(as_json: AsJson = False) -> None:
    """Show versions, the device and its free memory, and anything that is missing."""
    from packaging.specifiers import SpecifierSet

    needed = _wanted()
    versions = {name: version_of(name) for name in NEEDS}
    wanted = {name: needed.get(name.lower(), "") for name in NEEDS}
    trouble = {
        name: f"{'missing' if found is None else f'must be {wanted[name]}'}, for {NEEDS[name]}"
        for name, found in versions.items()
        if found is None or not SpecifierSet(wanted[name]).contains(found, True)
    }
    facts = _facts()
    if as_json:
        typer.echo(json.dumps({**facts, "packages": versions, "trouble": trouble}))
    else:
        rows = [(name, value, "") for name, value in facts.items()]
        rows += [(name, versions[name] or "missing", purpose) for name, purpose in NEEDS.items()]
        print_table(("what", "is", "for"), rows)
        for name, what in trouble.items():
            typer.secho(f"{name} {what}", fg="red", bold=True)
        names = " ".join(f"'{name}{wanted[name]}'" for name in trouble)
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
