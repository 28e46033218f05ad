"""A lockstep visitor that reduces what it sees to the moments of each site."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..errors import IterisError
from ..linalg.precision import full_precision
from ..lora import LowRank
from ..solve.directions import directions_of, find_directions
from ..solve.moments import (
    Directions,
    SharedInputs,
    TargetMoments,
    add_balance,
    add_inputs,
    add_target_rows,
    complete,
    new_inputs,
    new_target,
    target_of,
)
from ..solve.rows import SiteRows, rows_are_fewer
from .processes import ALONE, Shards
from .tokens import Group, Visit

_SAMPLE = 2  # tokens for each direction


@dataclass
class SiteMoments:
    """Everything that the solve of one site needs; lists run over the concepts. ``adds`` says that
    it was this site that its ``shared`` moments were made for."""

    shared: SharedInputs
    targets: list[TargetMoments]
    adds: bool = True


class Collector:
    """Adds up moments until they are taken with :meth:`take`.

    ``full`` collects TᵀX̃ for ``align="full"``; else XᵀX̃ for ``align="adapter"``. ``balance`` is
    the solve's, and decides what else it needs. Sites that receive the same tensor share their
    input moments (``share=False`` is there to test that). With ``shards`` every process visits its
    part of the rows, and what is taken is of all. ``acting`` are the sites whose own changes tell a
    visit's focus where a LoRA acts. ``inputs`` lists, for some sites, which of their inputs X̃ is
    reduced to. In a ``sweep`` forwards wait at a site with what they show until it is taken, so
    that it is reduced then, knowing all of it: of TᵀX̃ only the directions that a ``rank`` may keep,
    see :mod:`.directions` (None: Σ r_i); and with ``keep_rows`` sites with few tokens can be taken
    as they are with :meth:`take_rows`.
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
        sweep: bool = False,
        rank: int | None = None,
        keep_rows: bool = False,
    ) -> None:
        needs_moments = not full or balance not in ("tokens", "none") or shards.size > 1
        self._keep_rows = sweep and keep_rows and not needs_moments
        self._sweep = sweep
        self._rank = rank
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
        self._waiting: dict[str, list[Visit]] = {}
        self._groups: dict[Group, SharedInputs] = {}
        self._order: dict[tuple[str, int], Group] = {}

    def take(self, site: str) -> SiteMoments:
        """Hand over a site's moments and forget them."""
        waiting = self._waiting.pop(site, [])
        directions = self._directions(waiting) if waiting else None
        for visit in waiting:
            self._add(visit, directions)
        moments = self._sites.pop(site)
        for part in moments.shared.concepts:
            complete(part)
        self._add_up(moments)
        return moments

    def take_rows(self, site: str) -> SiteRows | None:
        """Hand over a site's rows and forget them; None where they are too many, and wanted as
        moments."""
        waiting = self._waiting[site] if self._keep_rows else []
        if not waiting or any(visit.group in self._groups for visit in waiting):
            return None
        out, width = self._shape(waiting[0])
        tokens = sum(visit.count(0, visit.rows) for visit in waiting)
        if not rows_are_fewer(tokens, out, width):
            return None
        del self._waiting[site]
        some = waiting[0].inputs
        shared: list[list[Tensor]] = [
            [some.new_zeros(0, width, dtype=self._dtype)] for _ in self._references[site]
        ]
        targets = [[some.new_zeros(0, out, dtype=self._dtype)] for _ in shared]
        for visit in waiting:
            for concept, start, stop in visit.spans:
                weigh = _weigher(visit, start, stop)
                merged = self._merged_inputs(visit, start, stop)
                shared[concept].append(weigh(merged.to(self._dtype)))
                targets[concept].append(self._target(visit, concept, start, stop))
        return SiteRows([torch.cat(p) for p in shared], [torch.cat(p) for p in targets])

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
        if visit.focus is not None and visit.site in self._acting:
            for concept, start, stop in visit.spans:
                change = self._references[visit.site][concept]
                if change is not None:
                    visit.focus.add(visit.own_effect(change, start, stop), visit.rows, start)
        if self._sweep:
            self._waiting.setdefault(visit.site, []).append(visit)
        else:
            self._add(visit)

    def _add(self, visit: Visit, directions: Directions | None = None) -> None:
        entry = self._sites.get(visit.site)
        if entry is None:
            entry = self._sites[visit.site] = self._new_entry(visit, directions)
        for concept, start, stop in visit.spans:
            change = self._references[visit.site][concept]
            weigh = _weigher(visit, start, stop)
            merged = weigh(self._merged_inputs(visit, start, stop).to(self._dtype))
            # X is wanted for XᵀX̃ and for the energy of X ΔWᵀ, outputs for T and for λ.
            reference = weigh(visit.input_tokens(start, stop)) if self._down_gram else None
            target = entry.targets[concept]
            with full_precision(merged.device):
                if entry.adds:
                    add_inputs(entry.shared.concepts[concept], reference, merged)
                full = weigh(visit.output_tokens(start, stop)) if self._full_energy else None
                add_balance(target, change, reference, full)
                if self._full:
                    wanted = self._target(visit, concept, start, stop)
                    add_target_rows(target, wanted, merged)

    def _target(self, visit: Visit, concept: int, start: int, stop: int) -> Tensor:
        """T of reference rows ``start`` to ``stop``, all of one concept, (tokens, out)."""
        change = self._references[visit.site][concept]
        full = visit.output_tokens(start, stop)
        base = self._base_output(visit, change, start, stop)
        drift = visit.drift_tokens(start, stop)
        return _weigher(visit, start, stop)(target_of(full, base, drift, self._dtype))

    def _directions(self, waiting: Sequence[Visit]) -> Directions | None:
        """Those that the targets of a site are reduced to, from a sample of them."""
        site = waiting[0].site
        changes = self._references[site]
        out, width = self._shape(waiting[0])
        rank = max(sum(c.rank for c in changes if c is not None), self._rank or 0)
        count = directions_of(out, width, rank)
        if not self._full or count is None or waiting[0].choice is None:
            return None
        # Of a row's tokens that may be chosen some are masked.
        offered = sum(replace(visit, mask=None).count(0, visit.rows) for visit in waiting)
        tokens = sum(visit.count(0, visit.rows) for visit in waiting)
        sizes = torch.tensor([sum(visit.rows for visit in waiting), offered, tokens])
        self._shards.add_up([sizes])
        rows, offered, tokens = sizes.tolist()
        few = math.ceil(_SAMPLE * count / rows * offered / max(tokens, 1))
        none = waiting[0].outputs.new_zeros(0, out, dtype=self._dtype)
        sample = [[none] for _ in changes]
        for visit in waiting:
            for concept, start, stop in visit.spans:
                sample[concept].append(self._target(visit.fewer(few), concept, start, stop))
        targets = [self._shards.gather(torch.cat(parts)) for parts in sample]
        if not all(bool(torch.isfinite(rows).all()) for rows in targets):
            return None  # the solve says so
        return find_directions(changes, targets, count)

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

    def _new_entry(self, visit: Visit, directions: Directions | None) -> SiteMoments:
        changes = self._references[visit.site]
        out, width = self._shape(visit)
        device = visit.inputs.device

        def make() -> SharedInputs:
            return SharedInputs(
                [
                    new_inputs(width, cross=not self._full, dtype=self._dtype, device=device)
                    for _ in changes
                ]
            )

        shared, adds = self._sharing(visit, make)
        targets = [
            new_target(
                out,
                width,
                c,
                full=self._full,
                down_gram=self._down_gram,
                full_energy=self._full_energy,
                directions=directions,
                dtype=self._dtype,
                device=device,
            )
            for c in changes
        ]
        return SiteMoments(shared, targets, adds)

    def _sharing(self, visit: Visit, make: Callable[[], SharedInputs]) -> tuple[SharedInputs, bool]:
        """What sites that receive this tensor share, and whether it was made for this one. A site
        of which some inputs count shares with none."""
        # Only tensors that are still alive can be shared; letting go frees what the others had.
        for gone in self._groups.keys() - visit.alive:
            del self._groups[gone]
        alone = not self._share or visit.site in self._inputs
        shared = None if alone else self._groups.get(visit.group)
        if shared is not None:
            return shared, False
        shared = make()
        if not alone:
            self._groups[visit.group] = shared
        return shared, True

    def _shape(self, visit: Visit) -> tuple[int, int]:
        """(out, in) of a site, of those inputs that count."""
        changes = self._references[visit.site]
        out, width = next(change.shape for change in changes if change is not None)
        chosen = self._inputs.get(visit.site)
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
