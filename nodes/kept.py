"""Merges that were made before, in ComfyUI's user folder: another strength, a restart or another
seed of the picture does not make them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import folder_paths
import torch

from ..iteris_core.config import ConceptConfig, MergeConfig
from ..iteris_core.errors import IterisError
from ..iteris_core.hosts.sample_store import SampleStore, digest
from ..iteris_core.lora import Lora, LowRank
from ..iteris_core.lora_files.embeddings import bundled, sidecar_files, unbundled
from ..iteris_core.lora_files.tensors import file_digest
from ..iteris_core.merge import MergeResult
from .comfy_digest import digest_of_base
from .comfy_lora import ComfySites
from .merge_settings import Request

_PACK = Path(__file__).parents[1]
_ABOUT = "about"
_NOTE = (
    "  Made before with the same inputs, so nothing ran. To make it again, set kept to clear in "
    "IterIS Settings."
)


@dataclass(frozen=True)
class Merge:
    """A merged ``lora``, its report as text, and whether its components are ``ordered`` by output
    energy."""

    lora: Lora
    report: str
    ordered: bool

    @classmethod
    def of(cls, result: MergeResult) -> Merge:
        report = result.report
        settings = report.settings
        ordered = settings.get("objective") == "output" and not settings.get("block_steps")
        planned = f"Planned: {report.outlook}.\n" if report.outlook else ""
        return cls(result.lora, planned + report.summary(), ordered)


def store(what: str) -> SampleStore:
    """The folder for ``samples`` or ``merges``."""
    return SampleStore(Path(folder_paths.get_user_directory(), "iteris", what))


def key_on_disk(
    models: Sequence[Any], clip: Any, config: MergeConfig, request: Request, boundary: float | None
) -> str | None:
    """A hash of all that a merge depends on: the files' contents, not where they are. None if a
    MODEL, CLIP or reference has none."""
    limits = [boundary, request.distilled, request.memory_budget]
    base = digest_of_base(models, clip, request.references, *limits)
    named = config.model_copy(update={"concepts": tuple(map(_by_content, config.concepts))})
    recipe = named.to_dict()
    if base is None or "embedding:" in json.dumps(recipe):  # of a file that may change
        return None
    return digest([base, recipe, _pack_version()])


def _by_content(concept: ConceptConfig) -> ConceptConfig:
    hashes = [file_digest(one) for file in concept.files for one in (file, *sidecar_files(file))]
    names = dict(zip(("file", "low"), (Path(file.name) for file in concept.files), strict=False))
    return concept.model_copy(update={"sha256": "+".join(hashes), **names})


@cache
def _pack_version() -> str:
    """A hash that any update of the pack changes."""
    files = sorted(_PACK.glob("iteris_core/**/*.py")) + sorted(_PACK.glob("nodes/*.py"))
    return digest([file.read_text(encoding="utf-8") for file in files])


def keep(merge: Merge, key: str) -> None:
    """Put a merge onto the disk."""
    lora = merge.lora
    tensors = dict(bundled(lora.embeddings))
    for site, change in lora.sites.items():
        tensors |= {f"{site} up": change.up, f"{site} down": change.down}
    about = {
        "name": lora.name,
        "metadata": dict(lora.metadata),
        "kernels": {site: change.kernel for site, change in lora.sites.items()},
        "report": merge.report,
        "ordered": merge.ordered,
    }
    text = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    store("merges").put({**tensors, _ABOUT: text}, key)


def kept(key: str, model: Any, clip: Any) -> Merge | None:
    """The merge that was kept under ``key``, if it is there and whole."""
    found = store("merges").get(key)
    if found is None:
        return None
    try:
        about = json.loads(bytes(found.pop(_ABOUT).numpy()))
        embeddings, parts = unbundled(Path("merged"), found)
        sites = {
            site: LowRank(parts[f"{site} up"], parts[f"{site} down"], kernel and tuple(kernel))
            for site, kernel in about["kernels"].items()
        }
        named = about["name"], about["metadata"]
    except (IterisError, KeyError, ValueError):
        return None
    base = ComfySites(model, clip).base
    lora = Lora(sites, *named, base=base, embeddings=embeddings)
    return Merge(lora, f"{about['report']}\n{_NOTE}", about["ordered"])
