"""Merges that were made before, in ComfyUI's user folder: another strength, a restart or another
seed of the picture does not make them again."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
import torch

from ..iteris_core.concepts import Concept
from ..iteris_core.config import MergeConfig
from ..iteris_core.errors import IterisError, LoraFileError, OutputError
from ..iteris_core.hosts.sample_store import SampleStore, digest
from ..iteris_core.lora import Lora, LowRank
from ..iteris_core.lora_files.embeddings import bundled, sidecar_files, unbundled
from ..iteris_core.lora_files.factors import exactly, store_all, stored_factors
from ..iteris_core.lora_files.metadata import parse_object
from ..iteris_core.lora_files.tensors import file_digest
from ..iteris_core.merge import MergeResult
from .comfy_conds import References
from .comfy_digest import digest_of_base
from .comfy_lora import ComfySites, listed_name
from .merge_settings import Request

_FORMAT = 1
"""Raised when an update makes other merges of the same inputs, which are then made again."""
_ABOUT = "about"
_IN_HEADLINE = ("samples", "LoRAs", "files", "size")
"""Notes that the headline has: what left prompts out, and what was known before the merge ran."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merge:
    """A merged ``lora``, its report in two parts, and whether its components are ``ordered`` by
    output energy. Everybody should read the ``headline``, and may read the ``details``. ``short``:
    of a merge with rows or prompts left out, the limits that did it (``minutes``, and ``memory`` in
    bytes) and what must be exceeded to make it again. ``stopped`` says where the user stopped its
    steps, which it lacks. ``again``: the input *kept* asked for it."""

    lora: Lora
    headline: str
    details: str
    ordered: bool
    short: Mapping[str, float] = field(default_factory=dict[str, float])
    again: bool = False
    stopped: str = ""

    @classmethod
    def of(
        cls, result: MergeResult, limits: Mapping[str, float] | None = None, *, again: bool = False
    ) -> Merge:
        report = result.report
        settings = report.settings
        ordered = settings.get("objective") == "output" and not settings.get("steps")
        cautions = [f"Not enough memory for {line}." for line in report.short]
        cautions += [note for name in _IN_HEADLINE for note in report.notes.get(name, ())]
        headline = "\n  ".join([report.headline(), *cautions])
        planned = f"  Planned: {report.outlook}.\n" if report.outlook else ""
        cut = {"memory": bool(report.short), "minutes": "samples" in report.notes}
        short = {name: limit for name, limit in (limits or {}).items() if cut[name]}
        details = planned + report.summary()
        return cls(result.lora, headline, details, ordered, short, again)

    @property
    def report(self) -> str:
        return f"{self.headline}\n{self.details}"

    def serves(self, limits: Mapping[str, float], *, again: bool) -> bool:
        """False if a new merge within ``limits`` would be more complete, or if it is to be made
        ``again`` and was not since that was chosen."""
        return again <= self.again and all(limits[name] <= was for name, was in self.short.items())


def store(what: str, *, anew: bool = False) -> SampleStore | None:
    """The folder for ``samples`` or ``merges``; one in which nothing is found if all is to be made
    ``anew``. None for a folder with files of others, which is left alone."""
    kind = _WriteOnly if anew else SampleStore
    try:
        return kind(Path(folder_paths.get_user_directory(), "iteris", what))
    except IterisError as error:
        _log.warning("Nothing is kept: %s", error)
        return None


class _WriteOnly(SampleStore):
    def get(self, *parts: str) -> None:
        return None


Place = str | tuple[Any, ...]
"""Where a merge is kept: the key on the disk or, without a hash, what it was made of."""
_last: list[tuple[Place, Merge]] = []
"""The last merge without a hash; it is kept until ComfyUI ends."""


def place_of(
    models: Sequence[Any], clip: Any, config: MergeConfig, request: Request, boundary: float | None
) -> Place | None:
    """By all that a merge depends on. Minutes and memory only decide whether it is whole. None if
    references have no hash."""
    calibration = {name: v for name, v in config.calibration.items() if name != "minutes"}
    config = config.model_copy(update={"calibration": calibration})
    if (key := key_on_disk(models, clip, config, request, boundary)) is not None:
        return key
    if request.references != References():
        return None
    parts = [weakref.ref(part) for part in (*models, clip) if part is not None]
    return parts, config, boundary, request.distilled


def key_on_disk(
    models: Sequence[Any], clip: Any, config: MergeConfig, request: Request, boundary: float | None
) -> str | None:
    """A hash of all that a merge depends on: the files' contents, not what they are called or where
    they are. None if a MODEL, CLIP or reference has none."""
    base = digest_of_base(models, clip, request.references, boundary, request.distilled)
    named = config.model_copy(update={"concepts": tuple(map(_by_content, config.concepts))})
    recipe = named.to_dict()
    if base is None or "embedding:" in json.dumps(recipe):  # of a file that may change
        return None
    return digest([base, recipe, _FORMAT])


def _by_content(concept: Concept) -> Concept:
    hashes = [file_hash(one) for file in concept.files for one in (file, *sidecar_files(file))]
    return replace(concept, sha256="+".join(hashes), file=None, low=None)


def file_hash(file: Path) -> str:
    """SHA-256 of a file, which is read again only when it has changed."""
    try:
        now = file.stat()
    except OSError as error:
        raise LoraFileError(f"{file} is gone ({error.strerror}); was it renamed?") from error
    return _hash_of(file, now.st_size, now.st_mtime_ns)


@lru_cache(4096)
def _hash_of(file: Path, size: int, changed: int) -> str:
    return file_digest(file)


def in_half(lora: Lora) -> Lora:
    """``lora`` as its half-precision file has it, which takes half the space and loses nothing of
    what the nodes hand on; as it is if values do not fit."""
    base = lora.base
    one_alpha = () if base is None else base.architecture.one_alpha
    try:
        stored = store_all(
            lora, torch.float16, one_alpha, even=base is not None and bool(base.written)
        )
    except OutputError:
        return lora
    return replace(lora, sites=stored)


def keep(merge: Merge, place: Place | None) -> None:
    """Put a merge into its place, if it has one."""
    if place is None:
        return
    if not isinstance(place, str):
        _last[:] = [(place, merge)]
        return
    lora = merge.lora
    tensors, scales = dict(bundled(lora.embeddings)), dict[str, float]()
    for site, change in lora.sites.items():
        half = exactly(change, change.scale, torch.float16)
        stored, dtype = half or replace(change, scale=1.0), torch.float16 if half else torch.float32
        up, down = stored_factors(stored, dtype)
        tensors |= {f"{site} up": up, f"{site} down": down}
        scales[site] = stored.scale
    about = {
        "name": lora.name,
        "metadata": dict(lora.metadata),
        "kernels": {site: change.kernel for site, change in lora.sites.items()},
        "scales": scales,
        "headline": merge.headline,
        "details": merge.details,
        "ordered": merge.ordered,
        "short": dict(merge.short),
        "again": merge.again,
        "stopped": merge.stopped,
    }
    text = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    if (merges := store("merges")) is not None:
        merges.put({**tensors, _ABOUT: text}, place)


def kept(place: Place, model: Any, clip: Any, concepts: Sequence[Concept]) -> Merge | None:
    """The merge in a place, if it is there and whole, with the names that its files have now."""
    if not isinstance(place, str):
        return next((merge for where, merge in _last if where == place), None)
    merges = store("merges")
    if merges is None or (found := merges.get(place)) is None:
        return None
    try:
        about = json.loads(bytes(found.pop(_ABOUT).numpy()))
        embeddings, parts = unbundled(Path("merged"), found)
        scales: dict[str, float] = about["scales"]
        sites = {
            site: LowRank.folded(
                parts[f"{site} up"].float().flatten(1),
                parts[f"{site} down"].float().flatten(1),
                scales[site],
                kernel and tuple(kernel),
            )
            for site, kernel in about["kernels"].items()
        }
        lora = Lora(
            sites,
            about["name"],
            _renamed(about["metadata"], concepts),
            base=ComfySites(model, clip).base,
            embeddings=embeddings,
        )
        told = (
            about[name] for name in ("headline", "details", "ordered", "short", "again", "stopped")
        )
        return Merge(lora, *told)
    except (IterisError, KeyError, TypeError, ValueError):
        return None


def _renamed(metadata: Mapping[str, str], concepts: Sequence[Concept]) -> Mapping[str, str]:
    """A merged LoRA's metadata with the names that the files of its ``concepts`` have now."""
    files = {"+".join(map(file_hash, one.files)): one.files for one in concepts if one.files}
    recipe = parse_object(metadata.get("iteris"))
    entries = [
        {**one, "lora": own[0].stem, "file": "+".join(map(listed_name, own))}
        if (own := files.get(one.get("sha256")))
        else one
        for one in recipe.get("concepts", ())
    ]
    inside = [one for one in entries if one.get("lora") and one.get("always_on") != "outside"]
    names = [one["lora"] for one in inside]
    return {
        **metadata,
        "iteris": json.dumps({**recipe, "concepts": entries}),
        "modelspec.title": " + ".join(names),
        "modelspec.merged_from": ", ".join(names),
    }
