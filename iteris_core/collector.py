"""A lockstep visitor that reduces what it sees to the moments of each site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from .errors import IterisError
from .lora import LowRank
from .moments import (
    SharedInputs,
    TargetMoments,
    add_inputs,
    add_target,
    add_target_rows,
    complete,
    full_precision,
    new_inputs,
    new_target,
    target_of,
)
from .shards import ALONE, Shards
from .solve_rows import SiteRows, rows_are_fewer
from .visit import Group, Visit

_Shared = TypeVar("_Shared")


@dataclass
class SiteMoments:
    """Everything that the solve of one site needs; lists run over the concepts. ``adds`` says that
    it was this site that its ``shared`` moments were made for."""

    shared: SharedInputs
    targets: list[TargetMoments]
    adds: bool = True


@dataclass
class _KeptRows:
    """The rows of a site while they are few: X̃ by concept, shared as input moments are, and T."""

    shared: list[list[Tensor]]
    targets: list[list[Tensor]]
    shape: tuple[int, int]
    adds: bool

    @property
    def tokens(self) -> int:
        return sum(len(piece) for pieces in self.shared for piece in pieces)

    def joined(self) -> SiteRows:
        out, width = self.shape
        some = next(piece for pieces in self.shared for piece in pieces)
        return SiteRows(
            [torch.cat([some.new_zeros(0, width), *pieces]) for pieces in self.shared],
            [torch.cat([some.new_zeros(0, out), *pieces]) for pieces in self.targets],
        )


class Collector:
    """Adds up moments until they are taken with :meth:`take`.

    ``full`` collects TᵀX̃ for ``align="full"``; else XᵀX̃ for ``align="adapter"``. ``balance`` is
    the solve's, and decides what else it needs. Sites that receive the same tensor share their
    input moments (``share=False`` is there to test that). With ``shards`` every process visits its
    part of the rows, and what is taken is of all. ``acting`` are the sites whose own changes tell a
    visit's focus where a LoRA acts. ``inputs`` lists, for some sites, which of their inputs X̃ is
    reduced to. With ``keep_rows`` (a sweep, where all rows show a site before the next) sites with
    few tokens keep them, to be taken with :meth:`take_rows`.
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[LowRank | None]],
        *,
        full: bool,
        balance: str = "none",
        dtype: torch.dtype = torch.float32,
        share: bool = True,
        shards: Shards = ALONE,
        acting: Set[str] = frozenset(),
        inputs: Mapping[str, Tensor] | None = None,
        keep_rows: bool = False,
    ) -> None:
        needs_moments = not full or balance not in ("tokens", "none") or shards.size > 1
        self._keep_rows = keep_rows and not needs_moments
        self._acting = acting
        self._inputs = dict(inputs or {})
        self._references = references
        self._full = full
        self._down_gram = not full or balance == "adapter"
        self._full_energy = balance == "full"
        self._dtype = dtype
        self._share = share
        self._shards = shards
        self._sites: dict[str, SiteMoments] = {}
        self._rows: dict[str, _KeptRows] = {}
        self._groups: dict[Group, SharedInputs] = {}
        self._row_groups: dict[Group, list[list[Tensor]]] = {}
        self._order: dict[tuple[str, int], Group] = {}

    def take(self, site: str) -> SiteMoments:
        """Hand over a site's moments and forget them."""
        moments = self._sites.pop(site)
        for part in moments.shared.concepts:
            complete(part)
        self._add_up(moments)
        return moments

    def take_rows(self, site: str) -> SiteRows | None:
        """Hand over a site's rows and forget them; None where they were too many."""
        kept = self._rows.pop(site, None)
        return None if kept is None else kept.joined()

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
        if visit.focus is not None and visit.site in self._acting:
            for concept, start, stop in visit.spans:
                change = changes[concept]
                if change is not None:
                    visit.focus.add(visit.own_effect(change, start, stop), visit.rows, start)
        if self._keep_rows and self._add_rows(visit, changes):
            return
        entry = self._sites.get(visit.site)
        if entry is None:
            entry = self._sites[visit.site] = self._new_entry(visit, changes)
        for concept, start, stop in visit.spans:
            change = changes[concept]
            weigh = _weigher(visit, start, stop)
            merged = weigh(self._merged_inputs(visit, start, stop).to(self._dtype))
            # X is wanted for XᵀX̃ and for the energy of X ΔWᵀ, outputs for T and for λ.
            reference = weigh(visit.input_tokens(start, stop)) if self._down_gram else None
            target = entry.targets[concept]
            with full_precision(merged.device):
                if entry.adds:
                    add_inputs(entry.shared.concepts[concept], reference, merged)
                if self._full or self._full_energy:
                    full = weigh(visit.output_tokens(start, stop))
                    base = self._base_output(visit, change, start, stop) if self._full else None
                    drift = visit.drift_tokens(start, stop) if self._full else None
                    base = None if base is None else weigh(base)
                    drift = None if drift is None else weigh(drift)
                    add_target(target, change, reference, merged, full, base, drift)
                else:
                    add_target(target, change, reference, merged, None, None)

    def _add_rows(self, visit: Visit, changes: Sequence[LowRank | None]) -> bool:
        """Keep what a visit shows; False where the site's rows are too many, and wanted as
        moments."""
        if visit.site in self._sites or visit.group in self._groups:
            return False
        kept = self._rows.get(visit.site)
        if kept is None:
            kept = self._new_rows(visit, changes)
            if not rows_are_fewer(kept.tokens, *kept.shape):
                self._to_moments(visit, changes, kept)
                return False
            self._rows[visit.site] = kept
        for concept, start, stop in visit.spans:
            weigh = _weigher(visit, start, stop)
            if kept.adds:
                merged = self._merged_inputs(visit, start, stop)
                # The model may change its tensor later.
                kept.shared[concept].append(weigh(merged.to(self._dtype, copy=True)))
            full = weigh(visit.output_tokens(start, stop))
            base = weigh(self._base_output(visit, changes[concept], start, stop))
            drift = visit.drift_tokens(start, stop)
            drift = None if drift is None else weigh(drift)
            kept.targets[concept].append(target_of(full, base, drift, self._dtype))
        if kept.adds and not rows_are_fewer(kept.tokens, *kept.shape):
            self._to_moments(visit, changes, self._rows.pop(visit.site))
        return True

    def _new_rows(self, visit: Visit, changes: Sequence[LowRank | None]) -> _KeptRows:
        shared, adds = self._sharing(self._row_groups, visit, lambda: [[] for _ in changes])
        return _KeptRows(shared, [[] for _ in changes], self._shape(visit.site, changes), adds)

    def _to_moments(self, visit: Visit, changes: Sequence[LowRank | None], kept: _KeptRows) -> None:
        entry = self._sites[visit.site] = self._new_entry(visit, changes)
        entry.adds = kept.adds
        self._row_groups.pop(visit.group, None)
        for part, target, rows, wanted in zip(
            entry.shared.concepts, entry.targets, kept.shared, kept.targets, strict=True
        ):
            for index, merged in enumerate(rows):
                with full_precision(merged.device):
                    add_inputs(part, None, merged)
                    if wanted:
                        add_target_rows(target, wanted[index], merged)

    def _add_up(self, moments: SiteMoments) -> None:
        """Over all processes; what sites share only once."""
        if self._shards.size == 1:
            return
        parts = [] if moments.shared.added_up else moments.shared.concepts
        moments.shared.added_up = True
        tokens = torch.tensor([part.tokens for part in parts], dtype=torch.float64)
        found = [part.own for part in parts] + [part.cross for part in parts]
        for target in moments.targets:
            found += [target.target, target.down_gram, target.target_energy, target.full_energy]
        self._shards.add_up([tokens, *(tensor for tensor in found if tensor is not None)])
        for part, count in zip(parts, tokens.tolist(), strict=True):
            part.tokens = round(count)

    def _base_output(self, visit: Visit, change: LowRank | None, start: int, stop: int) -> Tensor:
        """W0 on X̃, (tokens, out)."""
        if visit.copies == 2:
            return visit.output_tokens(start, stop, merged=True)
        full = visit.output_tokens(start, stop)
        return full if change is None else full - visit.own_change(change, start, stop)

    def _new_entry(self, visit: Visit, changes: Sequence[LowRank | None]) -> SiteMoments:
        out, width = self._shape(visit.site, changes)
        device = visit.inputs.device

        def make() -> SharedInputs:
            return SharedInputs(
                [
                    new_inputs(width, cross=not self._full, dtype=self._dtype, device=device)
                    for _ in changes
                ]
            )

        shared, adds = self._sharing(self._groups, visit, make)
        targets = [
            new_target(
                out,
                width,
                c,
                full=self._full,
                down_gram=self._down_gram,
                full_energy=self._full_energy,
                dtype=self._dtype,
                device=device,
            )
            for c in changes
        ]
        return SiteMoments(shared, targets, adds)

    def _sharing(
        self, groups: dict[Group, _Shared], visit: Visit, make: Callable[[], _Shared]
    ) -> tuple[_Shared, bool]:
        """What sites that receive this tensor share, and whether it was made for this one. A site
        of which some inputs count shares with none."""
        # Only tensors that are still alive can be shared; letting go frees what the others had.
        for gone in groups.keys() - visit.alive:
            del groups[gone]
        alone = not self._share or visit.site in self._inputs
        shared = None if alone else groups.get(visit.group)
        if shared is not None:
            return shared, False
        shared = make()
        if not alone:
            groups[visit.group] = shared
        return shared, True

    def _shape(self, site: str, changes: Sequence[LowRank | None]) -> tuple[int, int]:
        out, width = next(change.shape for change in changes if change is not None)
        chosen = self._inputs.get(site)
        return out, width if chosen is None else len(chosen)

    def _merged_inputs(self, visit: Visit, start: int, stop: int) -> Tensor:
        """X̃, (tokens, in), of those inputs that count."""
        tokens = visit.input_tokens(start, stop, merged=True)
        chosen = self._inputs.get(visit.site)
        if chosen is None:
            return tokens
        chosen = self._inputs[visit.site] = chosen.to(tokens.device)  # moved once
        return tokens.index_select(1, chosen)


def _weigher(visit: Visit, start: int, stop: int) -> Callable[[Tensor], Tensor]:
    """Multiplies tokens by the roots of their weights."""
    weights = visit.token_weights(start, stop)
    return _no_weights if weights is None else partial(torch.mul, weights.sqrt())


def _no_weights(tokens: Tensor) -> Tensor:
    return tokens
