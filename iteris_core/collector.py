"""A lockstep visitor that reduces what it sees to the moments of each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .errors import IterisError
from .lockstep import Group, Visit
from .lora import LowRank
from .moments import (
    SharedInputs,
    TargetMoments,
    add_inputs,
    add_target,
    full_precision,
    new_inputs,
    new_target,
)


@dataclass
class SiteMoments:
    """Everything that the solve of one site needs; lists run over the concepts."""

    shared: SharedInputs
    targets: list[TargetMoments]


class Collector:
    """Adds up moments until they are taken with :meth:`take`.

    ``full`` collects TᵀX̃ for ``align="full"``; else XᵀX̃ for ``align="adapter"``. Sites that
    receive the same tensor share their input moments (``share=False`` is there to test that).
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[LowRank | None]],
        *,
        full: bool,
        dtype: torch.dtype = torch.float32,
        share: bool = True,
    ) -> None:
        self._references = references
        self._full = full
        self._dtype = dtype
        self._share = share
        self._sites: dict[str, SiteMoments] = {}
        self._groups: dict[Group, SharedInputs] = {}
        self._order: dict[tuple[str, int], Group] = {}

    def take(self, site: str) -> SiteMoments:
        """Hand over a site's moments and forget them."""
        return self._sites.pop(site)

    @property
    def sites(self) -> list[str]:
        """Sites with moments that nobody has taken, in execution order."""
        return list(self._sites)

    def visit(self, visit: Visit) -> None:
        group = self._order.setdefault((visit.site, visit.call), visit.group)
        if group != visit.group:
            raise IterisError(
                f"The micro-batches took different paths through the model at site {visit.site}; "
                "use one micro-batch."
            )
        changes = self._references[visit.site]
        entry = self._sites.get(visit.site)
        if entry is None:
            entry = self._sites[visit.site] = self._new_entry(visit, changes)
        add_shared = visit.first or not self._share
        for concept, start, stop in visit.spans:
            change = changes[concept]
            reference = visit.input_tokens(start, stop)
            merged = visit.input_tokens(start, stop, merged=True)
            full = visit.output_tokens(start, stop)
            if visit.copies == 2:
                base = visit.output_tokens(start, stop, merged=True)
            elif change is None:
                base = full
            else:
                base = full - visit.own_change(change, start, stop)
            with full_precision(merged.device):
                if add_shared:
                    add_inputs(entry.shared.concepts[concept], reference, merged)
                add_target(
                    entry.targets[concept],
                    change,
                    reference,
                    merged,
                    full,
                    base,
                    visit.drift_tokens(start, stop) if self._full else None,
                )

    def _new_entry(self, visit: Visit, changes: Sequence[LowRank | None]) -> SiteMoments:
        change = next(change for change in changes if change is not None)
        out, width = change.shape
        device = visit.inputs.device
        shared = self._groups.get(visit.group) if self._share else None
        if shared is None:
            shared = SharedInputs(
                [
                    new_inputs(width, cross=not self._full, dtype=self._dtype, device=device)
                    for _ in changes
                ]
            )
            # Only tensors that are still alive can be shared; letting go frees the others' moments.
            self._groups = {g: s for g, s in self._groups.items() if g in visit.alive}
            self._groups[visit.group] = shared
        targets = [
            new_target(out, width, c, full=self._full, dtype=self._dtype, device=device)
            for c in changes
        ]
        return SiteMoments(shared, targets)
