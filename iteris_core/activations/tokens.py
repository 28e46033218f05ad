"""The inputs and outputs of one micro-batch at one site, as tokens; which of them count, and how
much."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..lora import LowRank, SiteChanges
from .site import Site, by_row

Group = tuple[str, int]
"""Identifies a tensor as a site received it: its stage, and a number. An in-place change of the
tensor gives it another number."""

_REPAIR = 0.3
"""ε: a layer that adds less than this share of its stream hardly repairs."""


class TokenSampling:
    """At most ``limit(width)`` tokens of every row at a site with that many inputs (None: all). A
    row's selection depends only on its index in ``rows``, ``seed`` and the number of tokens; a
    smaller selection is a subset of a larger one. ``whole`` is the original number of tokens, if
    the present ones are already a selection. ``gathered`` caches selected tokens of live
    tensors."""

    def __init__(
        self,
        rows: Sequence[int],
        limit: Callable[[int], int] | None,
        seed: int,
        whole: int | None = None,
    ) -> None:
        self.rows = rows
        self._limit = limit
        self._seed = seed
        self._whole = whole
        self._picks: dict[tuple[int, int], Tensor] = {}
        self._made: dict[int, TokenSampling] = {}
        self.gathered: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()

    def indices(self, length: int, start: int, stop: int, *, width: int) -> Tensor | None:
        """Selected indices into the flattened tokens of rows ``start`` to ``stop``; None: all."""
        limit = length if self._limit is None else self._limit(width)
        if length <= limit:
            return None
        if (length, limit) not in self._picks:
            picks: list[Tensor] = []
            for row in self.rows:
                pick = self._first(row, self._whole or length, limit)
                if self._whole is not None:
                    pick = torch.searchsorted(self._first(row, self._whole, length), pick)
                picks.append(pick)
            self._picks[length, limit] = torch.stack(picks)
        offsets = torch.arange(stop - start)[:, None] * length
        return (self._picks[length, limit][start:stop] + offsets).flatten()

    def at_most(self, tokens: int) -> TokenSampling:
        """A subset of this selection."""
        limit = self._limit

        def fewer(width: int) -> int:
            return tokens if limit is None else min(tokens, limit(width))

        part = TokenSampling(self.rows, fewer, self._seed, self._whole)
        part._picks = self._picks  # computed once
        return part

    def made(self, length: int, width: int) -> TokenSampling | None:
        """This selection for tokens already reduced to the selected ones; None: all are
        selected."""
        if self._limit is None or length <= self._limit(width) or self._whole is not None:
            return None
        if length not in self._made:
            self._made[length] = TokenSampling(self.rows, self._limit, self._seed, length)
        return self._made[length]

    def _first(self, row: int, length: int, limit: int) -> Tensor:
        """``limit`` indices of a row's ``length`` tokens, ascending."""
        digest = hashlib.blake2b(f"{self._seed} {row} {length}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.randperm(length, generator=generator)[:limit].sort().values


@dataclass
class Saliency:
    """How much the tokens of one micro-batch's rows count: more where a LoRA acts.

    A site has one change for all concepts. When they want different outputs for similar inputs,
    something must be given up, preferably background. With a share f, token t of a row has the
    weight

        w_t = 1 − f + f · e_t,   e_t = mean over sites of ‖ΔW_i x_t‖² / (their mean over the row),

    over the sites that LoRA i changes, that write to the residual stream, and that this forward
    has passed with the same number of tokens. A row's mean weight is 1. Weights come only from
    reference rows, so they are the same in a sweep and in Jacobi iterations.

    Holds the running sums of e by number of tokens; ``share`` is f.
    """

    share: float
    _given: dict[tuple[Hashable, int], Tensor | None] = field(default_factory=dict[Any, Any])
    _sums: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    _counts: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def add(self, effect: Tensor, rows: int, start: int) -> None:
        """``effect`` is ‖ΔW_i x_t‖² for rows starting at ``start``, out of ``rows``: (n, tokens), 0
        for tokens that do not count. Zero rows are ignored."""
        length = effect.shape[1]
        if length not in self._sums:
            self._sums[length] = effect.new_zeros(rows, length)
            self._counts[length] = effect.new_zeros(rows, 1)
        mean = effect.mean(1, keepdim=True)
        part = slice(start, start + len(effect))
        self._sums[length][part] += torch.where(mean > 0, effect / mean.clamp(min=1e-30), 0.0)
        self._counts[length][part] += (mean > 0).to(effect)

    def weights(self, tensor: Hashable, alive: Set[Hashable], length: int) -> Tensor | None:
        """(rows, tokens), or None if all count equally; the same for all sites that see equally
        many tokens of the ``tensor`` with this key. ``alive`` are keys that may occur again."""
        key = tensor, length
        if key not in self._given:
            weights, count = None, self._counts.get(length)
            if count is not None:
                mean = self._sums[length] / count.clamp(min=1)
                weights = torch.where(count > 0, 1 - self.share + self.share * mean, 1.0)
            self._given = {k: given for k, given in self._given.items() if k[0] in alive}
            self._given[key] = weights
        return self._given[key]


@dataclass(frozen=True)
class Observation:
    """The inputs and outputs of one micro-batch at one site, before the merged change is added.
    ``inputs`` and ``outputs`` are the site's own tensors, rows first, reference rows before merged
    rows; the model may change them later. ``outputs`` include the reference rows' changes.
    ``spans`` lists (concept, start, stop) in reference rows; a merged row is ``rows`` further down
    (``copies=2``) or the reference row itself (``copies=1``). ``group`` is the same for sites that
    received the same tensor; ``alive`` lists the groups that may still occur; ``call`` counts the
    site's earlier calls in this forward. ``choice`` selects some of every row's tokens; ``mask``,
    (rows, tokens), is True for those that count (None: all). ``stream`` is the residual stream to
    which the output will be added, shaped like ``outputs`` (None: unknown), and ``gate``, (rows,
    out), multiplies the output before that, with ``normed`` after an RMS norm. ``weights``, (rows,
    tokens), are the values of the micro-batch's ``saliency`` here (None: all count equally), and
    ``strengths`` the rows', by which tokens of ``inputs`` are multiplied (None: 1)."""

    name: str
    site: Site
    inputs: Tensor
    outputs: Tensor
    rows: int
    copies: int
    spans: Sequence[tuple[int, int, int]]
    group: Group
    alive: set[Group]
    call: int
    choice: TokenSampling
    mask: Tensor | None = None
    stream: Tensor | None = None
    saliency: Saliency | None = None
    weights: Tensor | None = None
    strengths: Tensor | None = None
    gate: Tensor | None = None
    normed: bool = False

    def gathered(self) -> Observation:
        """A copy with only the tokens that ``choice`` selects."""
        length, width = self.site.length(self.outputs), self.site.shape[1]
        choice = self.choice.made(length, width)
        if choice is None:
            return self
        picked = self.choice.indices(length, 0, self.rows, width=width)

        def narrow(tensor: Tensor, flatten: Callable[[Tensor], Tensor]) -> Tensor:
            parts = [_selected(flatten(part), picked) for part in tensor.split(self.rows)]
            tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
            return tokens.reshape(self.rows * self.copies, -1, tokens.shape[-1])

        def of_rows(values: Tensor | None) -> Tensor | None:
            """(rows, tokens), restricted to the selected ones."""
            if values is None:
                return None
            return _selected(values.flatten(), picked).reshape(self.rows, -1)

        key = self.group, self.site.geometry
        inputs = self.choice.gathered.get(key)
        if inputs is None:  # not of another site that received it
            inputs = self.choice.gathered[key] = narrow(self.inputs, self.site.tokens)
        return replace(
            self,
            site=Site(self.site.shape),
            inputs=inputs,
            outputs=narrow(self.outputs, self.site.outputs),
            stream=None if self.stream is None else narrow(self.stream, self.site.outputs),
            mask=of_rows(self.mask),
            weights=of_rows(self.weights),
            choice=choice,
        )

    def count(self, start: int, stop: int) -> int:
        """The number of tokens of rows ``start`` to ``stop`` that count."""
        length = self.site.length(self.outputs)
        chosen = self._choice(length, start, stop)
        return (stop - start) * length if chosen is None else len(chosen)

    def effect(self, change: LowRank, start: int, stop: int) -> Tensor:
        """‖ΔW x‖² for every token of the reference rows, (rows, tokens), 0 if masked."""
        added = self.changed(change, start, stop)
        added = added.to(torch.promote_types(added.dtype, torch.float32))
        effect = added.square().sum(1).reshape(stop - start, -1)
        return effect if self.mask is None else effect * self.mask[start:stop]

    def changed(self, change: LowRank, start: int, stop: int) -> Tensor:
        """ΔW x for the reference rows, (tokens, out)."""
        inputs = self.inputs[start:stop]
        delta = self.site.delta(change.to(inputs.dtype, inputs.device), inputs)
        strengths = None if self.strengths is None else self.strengths[start:stop]
        return self.site.outputs(by_row(delta, strengths))

    def chosen(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        """The tokens of rows ``start`` to ``stop`` that count."""
        return _selected(tokens, self._choice(tokens.shape[0] // (stop - start), start, stop))

    def _choice(self, length: int, start: int, stop: int) -> Tensor | None:
        """Indices of these rows' tokens that count; None: all."""
        chosen = self.choice.indices(length, start, stop, width=self.site.shape[1])
        if self.mask is None:
            return chosen
        mask = self.mask[start:stop].reshape(-1)
        if chosen is None:
            return mask.nonzero().flatten()
        chosen = chosen.to(mask.device)
        return chosen[mask[chosen]]


def _selected(tokens: Tensor, chosen: Tensor | None) -> Tensor:
    """(tokens, …), reduced to the ``chosen`` ones; None: all."""
    if chosen is None:
        return tokens
    return tokens.index_select(0, chosen.to(tokens.device, non_blocking=True))


@dataclass(frozen=True)
class ConceptTokens:
    """Tokens of one concept's rows ``start`` to ``stop``, in the moments' precision, each
    multiplied by the root of its weight and computed on demand: ``merged`` X̃ and ``reference`` X,
    (tokens, in); ``target`` T and ``output``, the whole output (W0 + ΔW_i) X, (tokens, out)."""

    shown: Observation
    changes: SiteChanges
    concept: int
    start: int
    stop: int
    dtype: torch.dtype
    inputs: Tensor | None = None

    @property
    def merged(self) -> Tensor:
        return self._merged

    @cached_property
    def _merged(self) -> Tensor:
        tokens = self._inputs_of(merged=True)
        if self.inputs is not None:
            tokens = tokens.index_select(1, self.inputs.to(tokens.device))
        return self._weighted(tokens)

    @property
    def reference(self) -> Tensor:
        return self._weighted(self._inputs_of())

    @property
    def output(self) -> Tensor:
        return self._weighted(self._tokens(self.shown.site.outputs, self.shown.outputs))

    @property
    def target(self) -> Tensor:
        """(W0 + ΔW_i) X minus W0 X̃, both with the layer's bias, plus the drift d = h_i − h̃_i, the
        difference between LoRA i's residual stream and the merged rows'. Behind a gate g the output
        y is what minimises ‖g̃ y − g_i y_i − d‖² / ‖h̃‖² + ε² ‖y − y_i‖² / ‖y_i‖² for every token:
        y_i + (d + (g_i − g̃) y_i) g̃ / (g̃² + ε² ‖h̃‖² / ‖y_i‖²). So a layer that adds little to
        its stream repairs little. A norm between them belongs to the gates, at the size that y_i
        has."""
        flatten = self.shown.site.outputs
        full = self._tokens(flatten, self.shown.outputs)
        rows, base = (self.start, self.stop), full  # W0 X̃
        if self.shown.copies == 2:
            base = self._tokens(flatten, self.shown.outputs, merged=True)
        elif (change := self.changes[self.concept]) is not None:
            base = full - self.shown.chosen(self.shown.changed(change, *rows), *rows)
        target = full.to(self.dtype) - base.to(self.dtype)
        if self.shown.stream is None or self.shown.copies == 1:
            return self._weighted(target)
        stream = self._tokens(flatten, self.shown.stream, merged=True)
        drift = (self._tokens(flatten, self.shown.stream) - stream).to(self.dtype)
        if self.shown.gate is None:
            return self._weighted(target.add_(drift))
        each = torch.arange(*rows).repeat_interleave(self.shown.site.length(self.shown.outputs))
        each = self.shown.chosen(each, *rows).to(self.shown.gate.device)
        own, merged = (self.shown.gate[at].to(self.dtype) for at in (each, self.shown.rows + each))
        full, stream = full.to(self.dtype), stream.to(self.dtype)
        size = full.square().mean(1, keepdim=True)
        if self.shown.normed:
            norm = size.sqrt().clamp(min=1e-6)
            own, merged = own / norm, merged / norm
        least = _REPAIR**2 * stream.square().mean(1, keepdim=True) / size.clamp(min=1e-30)
        missing = drift + (own - merged) * full
        return self._weighted(target.add_(missing * merged / (merged.square() + least)))

    def _inputs_of(self, *, merged: bool = False) -> Tensor:
        """X, or X̃ if ``merged``, in the model's dtype; for a convolution, tokens are patches."""
        shown = self.shown
        tokens = self._tokens(shown.site.tokens, shown.inputs, merged=merged)
        if shown.strengths is None:
            return tokens
        of_rows = shown.strengths[self.start : self.stop].to(tokens)
        of_rows = of_rows.repeat_interleave(shown.site.length(shown.outputs))
        return tokens * shown.chosen(of_rows[:, None], self.start, self.stop)

    def _tokens(
        self, flatten: Callable[[Tensor], Tensor], tensor: Tensor, *, merged: bool = False
    ) -> Tensor:
        """The tokens of a ``tensor`` of the site that count, of the reference rows or of the merged
        ones."""
        offset = self.shown.rows if merged and self.shown.copies == 2 else 0
        tokens = flatten(tensor[offset + self.start : offset + self.stop])
        return self.shown.chosen(tokens, self.start, self.stop)

    def _weighted(self, tokens: Tensor) -> Tensor:
        tokens, weights = tokens.to(self.dtype), self.shown.weights
        if weights is None:
            return tokens
        weights = weights[self.start : self.stop].reshape(-1, 1)
        return tokens * self.shown.chosen(weights, self.start, self.stop).to(tokens).sqrt()
