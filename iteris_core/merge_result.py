"""What comes out of a merge: the LoRA, its report, and where they go."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .concepts import Calibration, Concept
from .errors import IterisError
from .hosts.diffusers_lora import load_adapter
from .hosts.learned import embedding_triggers
from .lora import Lora
from .lora_files import Layout
from .lora_files.experts import write_by_expert
from .methods import Method
from .methods.registry import Merged
from .passes.changes import always_on, beside, changes_always
from .report.provenance import join_embeddings, lacks_of, merge_metadata, notes_of
from .report.report import MergeReport, SiteReport
from .saving import rescued
from .settings import Settings
from .solve.problem import Solution


@dataclass(frozen=True)
class MergeResult:
    lora: Lora
    report: MergeReport

    def save(
        self,
        path: str | Path,
        *,
        layout: Layout | None = None,
        dtype: str | torch.dtype = "float16",
        overwrite: bool = False,
    ) -> Path:
        """Write the merged LoRA; see :func:`.lora_files.write_lora`. If that fails, the error says
        where the merge is instead, as float32. One for two experts becomes two files,
        ``<stem>_high_noise`` and ``<stem>_low_noise``; returns the first."""
        with self._rescued():
            return write_by_expert(
                self.lora, Path(path), layout=layout, dtype=dtype, overwrite=overwrite
            )[0]

    def load_into(self, pipeline: Any, adapter_name: str = "iteris") -> None:
        """Load the merged LoRA into a diffusers pipeline, just like its file, as the only active
        adapter; an earlier one of that name is replaced.

        ``pipeline.unload_lora_weights()`` removes it. Embeddings that came with the LoRAs are not
        loaded; to use them, save the LoRA. Raises :class:`OutputError` if the pipeline cannot load
        all of it, which also says in which file the merge is.
        """
        with self._rescued():
            load_adapter(pipeline, self.lora, adapter_name)

    @contextmanager
    def _rescued(self) -> Generator[None]:
        """Context whose errors say in which file the merge is."""
        try:
            yield
        except IterisError as error:
            write = partial(write_by_expert, self.lora, dtype="float32")
            raise rescued(write, "merged.safetensors", error) from error


Notes = list[tuple[str, list[str]]]
"""Notes by the name of what they are on, for the report."""


def result_of(
    concepts: Sequence[Concept],
    merged: Merged,
    sizes: Mapping[str, float],
    always: Sequence[Concept],
    method: Method,
    settings: Settings,
    calibration: Calibration,
    noted: Notes,
    kept: Mapping[str, Sequence[float]],
    seconds: float,
) -> MergeResult:
    """The result of a merge of ``concepts``, including the changes of ``always`` on LoRAs that
    belong in the file. ``sizes`` are the norms of the LoRAs' changes together, and ``kept`` is what
    held-out rows keep."""
    log, every = merged.log, [*concepts, *always]
    changes = {site: solution.change for site, solution in merged.sites.items()}
    sites = beside(changes, changes_always(always_on(always, "include")))
    loras = [concept.lora for concept in every if concept.lora is not None]
    joined = join_embeddings(every)
    notes = notes_of(every)
    where = {"include": "part of the merged LoRA", "outside": "load it beside the merged LoRA"}
    why = "no trigger word, so it acts on every prompt: "
    on = "on while the others were merged"
    of_always = [
        (c.name, [f"{'' if c.phrases else why}{on}; {where[c.always_on]}"]) for c in always
    ]
    of_all = ("sites", log.notes), ("embeddings", joined.warnings)
    for name, more in (*noted, *of_always, *of_all):
        if more:
            notes.setdefault(name, []).extend(more)
    report = MergeReport(
        method=method.name,
        concepts=[concept.name for concept in concepts],
        sites={
            site: SiteReport.of(
                replace(merged.sites.get(site, Solution(change)), change=change),
                len(concepts),
                repair=site in merged.repairs,
                size=sizes.get(site, 0.0),
            )
            for site, change in sites.items()
        },
        seconds=seconds,
        settings=asdict(settings),
        calibration=asdict(calibration) if method.needs_host else {},
        notes=notes,
        rows=log.rows,
        plan=list(log.plan),
        short=list(log.short),
        convergence=list(log.convergence),
        preserved=[concept.name for concept in concepts if concept.lora is None],
        lacks=lacks_of(every),
        kept=kept,
    )
    lora = Lora(
        sites,
        "merged",
        merge_metadata(every, report, joined, [*map(embedding_triggers, every)]),
        base=next((lora.base for lora in loras if lora.base is not None), None),
        embeddings=joined.embeddings,
    )
    return MergeResult(lora, report)
