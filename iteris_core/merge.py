"""``merge_loras``: several LoRAs in, one LoRA and a report out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .calibration import Calibration, Concept
from .errors import IterisError, MergeCancelled, SettingsError
from .hosts import Host
from .lora import Lora, LowRank
from .lora_files import Layout, write_lora
from .methods import Task, find_method
from .provenance import join_embeddings, merge_metadata, notes_of
from .report import MergeReport
from .shards import ALONE, Shards

_log = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]
"""``on_progress(what, done, total)``"""


@dataclass(frozen=True)
class MergeResult:
    lora: Lora
    report: MergeReport

    def save(
        self,
        path: str | Path,
        *,
        layout: Layout = "kohya",
        dtype: str = "float16",
        overwrite: bool = False,
    ) -> Path:
        """Write the merged LoRA; see :func:`.lora_files.write_lora`."""
        return write_lora(self.lora, path, layout=layout, dtype=dtype, overwrite=overwrite)


def merge_loras(
    host: Host | None,
    concepts: Sequence[Concept],
    method: str = "iteris",
    *,
    settings: Any = None,
    calibration: Calibration | None = None,
    generator: torch.Generator | None = None,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
    shards: Shards = ALONE,
    memory_budget: int | Literal["free"] | None = "free",
) -> MergeResult:
    """Merge the LoRAs of ``concepts`` into one.

    ``host`` runs the base model; a method that only looks at weights takes None. ``settings`` is
    the method's own dataclass or a mapping of its fields. ``generator`` (on the CPU) decides
    prompts and latents; without one it is seeded by ``calibration.seed``. ``should_stop`` is asked
    at every step; when it says yes :class:`MergeCancelled` is raised. With ``shards`` several
    processes that call this alike share the rows and end with the same result. ``memory_budget``
    is what the merge may take beyond the model, in bytes (None: no limit); it decides how many rows
    run at once and, if it must, how many run at all, which the report's plan tells. The base model
    is bit-identical afterwards, whatever happens.

    Raises :class:`IterisError` for input that cannot be merged.
    """
    started = time.perf_counter()
    chosen = find_method(method)
    settings = _settings(chosen.settings, settings, method)
    calibration = calibration or Calibration()
    if generator is None:
        generator = torch.Generator().manual_seed(calibration.seed)
    concepts = [concept for concept in concepts if concept.counts]
    references = _references(concepts)
    if chosen.needs_host:
        if host is None:
            raise SettingsError(f"Method {method!r} runs the base model: pass a host.")
        _check_sites(host, references)
    else:
        # Prompts without a LoRA say nothing to a method that only looks at weights.
        kept = [i for i, concept in enumerate(concepts) if concept.lora is not None]
        concepts = [concepts[i] for i in kept]
        references = {site: [c[i] for i in kept] for site, c in references.items()}

    def tick(what: str, done: int, total: int) -> None:
        if should_stop is not None and should_stop():
            raise MergeCancelled("The merge was cancelled; nothing was changed or written.")
        if on_progress is not None:
            on_progress(what, done, total)

    task = Task(
        host,
        concepts,
        references,
        calibration,
        generator,
        tick,
        shards=shards,
        memory_budget=memory_budget,
    )
    missing = _not_in_force(host, concepts) if host is not None and chosen.needs_host else {}
    for name, notes in missing.items():
        _log.warning("%s: %s", name, "; ".join(notes))
    merged = chosen.merge(task, settings)
    names = [concept.name for concept in concepts]
    report = MergeReport(
        method=method,
        concepts=names,
        sites={site: report for site, (_, report) in merged.items()},
        seconds=time.perf_counter() - started,
        settings=asdict(settings),
        calibration=asdict(calibration) if chosen.needs_host else {},
        notes=_notes(concepts, missing),
        rows=task.rows,
        plan=task.plan,
        convergence=task.convergence,
    )
    loras = [concept.lora for concept in concepts if concept.lora is not None]
    embeddings, _ = join_embeddings(loras)
    lora = Lora(
        {site: change for site, (change, _) in merged.items()},
        "merged",
        merge_metadata(concepts, report),
        base=next((lora.base for lora in loras if lora.base is not None), None),
        embeddings=embeddings,
    )
    return MergeResult(lora, report)


def _not_in_force(host: Host, concepts: Sequence[Concept]) -> dict[str, list[str]]:
    """By concept: the embeddings that its file brings and its prompts do not call for. With fewer
    of them the LoRA is not what it was trained to be, and its features are others."""
    notes: dict[str, list[str]] = {}
    for concept in concepts:
        brought = concept.lora.embeddings if concept.lora is not None else {}
        prompts = [concept.subject] if concept.prompts is None else concept.prompts
        called = {name for prompt in prompts for name in host.learned(prompt)} if brought else set()
        if len(called) >= len(brought):  # whatever they are called there
            continue
        missing = [name for name in brought if name not in called]
        notes.setdefault(concept.name, []).append(
            f"its embedding {', '.join(missing)} is NOT IN FORCE while features are collected, so "
            "this concept is merged without what its trigger has learned: load it into the text "
            "encoder first (diffusers: load_textual_inversion; ComfyUI: a file in "
            "models/embeddings), and call for it in the trigger or the prompts (ComfyUI: "
            "embedding:NAME)"
        )
    return notes


def _notes(concepts: Sequence[Concept], more: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    notes = notes_of(concepts)
    for name, some in more.items():
        notes.setdefault(name, []).extend(some)
    _, warnings = join_embeddings([c.lora for c in concepts if c.lora is not None])
    return notes | ({"embeddings": warnings} if warnings else {})


def _settings(kind: type, given: Any, method: str) -> Any:
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given
    if isinstance(given, Mapping):
        try:
            return kind(**given)
        except TypeError as error:
            raise SettingsError(f"Settings of method {method!r}: {error}.") from error
    raise SettingsError(
        f"Method {method!r} takes {kind.__name__} as settings, not {type(given).__name__}."
    )


def _references(concepts: Sequence[Concept]) -> dict[str, list[LowRank | None]]:
    """Every concept's change of every site that any of them changes, at its strength."""
    loras = [concept.lora for concept in concepts if concept.lora is not None]
    if not loras:
        raise IterisError("There is no LoRA to merge: every concept is empty or at strength 0.")
    kinds = sorted({lora.base.kind.title for lora in loras if lora.base is not None})
    if len(kinds) > 1:
        raise IterisError(f"The LoRAs were made for different base models: {', '.join(kinds)}.")
    sites = {site: None for lora in loras for site in lora.sites}
    if not sites:
        raise IterisError("The LoRAs change no site at all; are the files empty?")
    references: dict[str, list[LowRank | None]] = {}
    for site in sites:
        changes = [
            concept.lora.sites[site].scaled(concept.strength)
            if concept.lora is not None and site in concept.lora.sites
            else None
            for concept in concepts
        ]
        shapes = {change.shape for change in changes if change is not None}
        if len(shapes) > 1:
            raise IterisError(
                f"Site {site} has changes of different shapes {sorted(shapes)}; the LoRAs were "
                "made for different base models."
            )
        references[site] = changes
    return references


def _check_sites(host: Host, references: Mapping[str, Sequence[LowRank | None]]) -> None:
    known = host.sites()
    missing = [site for site in references if site not in known]
    if missing:
        raise IterisError(
            f"{len(missing)} of {len(references)} sites are not in the base model, such as "
            f"{', '.join(missing[:3])}; the LoRAs were made for another base model."
        )
