"""The inputs and outputs of a concept's rows at one site, as tokens; which of them count, and how
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


@dataclass(frozen=True, eq=False)
class TokenSampling:
    """At most ``limit(width)`` tokens of every row at a site with that many inputs (None: all). A
    row's selection depends only on its index in ``rows``, ``seed`` and the number of tokens; a
    smaller selection is a subset of a larger one. ``whole`` is the original number of tokens, if
    the present ones are already a selection. ``gathered`` caches selected tokens of live
    tensors."""

    rows: Sequence[int] = ()
    limit: Callable[[int], int] | None = None
    seed: int = 0
    whole: int | None = None
    gathered: WeakValueDictionary[Hashable, Tensor] = field(
        default_factory=WeakValueDictionary[Hashable, Tensor]
    )
    _picks: dict[tuple[int | None, int, int], Tensor] = field(default_factory=dict[Any, Any])

    def indices(self, length: int, width: int) -> Tensor | None:
        """Selected indices into the flattened tokens of all rows, ``length`` each; None: all."""
        limit = length if self.limit is None else self.limit(width)
        if length <= limit:
            return None
        key = self.whole, length, limit
        if key not in self._picks:
            picks: list[Tensor] = []
            for number, row in enumerate(self.rows):
                pick = self._first(row, self.whole or length, limit)
                if self.whole is not None:
                    pick = torch.searchsorted(self._first(row, self.whole, length), pick)
                picks.append(pick + number * length)
            self._picks[key] = torch.cat(picks)
        return self._picks[key]

    def part(self, start: int, stop: int) -> TokenSampling:
        """The selection in the rows ``start`` to ``stop``."""
        return TokenSampling(self.rows[start:stop], self.limit, self.seed)

    def at_most(self, tokens: int) -> TokenSampling:
        """A subset of this selection."""
        limit = self.limit

        def fewer(width: int) -> int:
            return tokens if limit is None else min(tokens, limit(width))

        return replace(self, limit=fewer)

    def _first(self, row: int, length: int, limit: int) -> Tensor:
        """``limit`` indices of a row's ``length`` tokens, ascending."""
        digest = hashlib.blake2b(f"{self.seed} {row} {length}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.randperm(length, generator=generator)[:limit].sort().values


@dataclass
class Saliency:
    """How much the tokens of a micro-batch's rows of one concept count: more where its LoRA acts.

    A site has one change for all concepts. When they want different outputs for similar inputs,
    something must be given up, preferably background. With a share f, token t of a row has the
    weight

        w_t = 1 − f + f · e_t,   e_t = mean over sites of ‖ΔW_i x_t‖² / (their mean over the row),

    over the sites that LoRA i changes, that write to the residual stream, and that this forward
    has passed with the same number of tokens. A row's mean weight is 1. Weights come only from
    reference rows, so they are the same in a sweep and in Jacobi iterations.

    Holds the running sums of e, and their counts, by number of tokens; ``share`` is f.
    """

    share: float
    _sums: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, Any])
    _weights: dict[tuple[Hashable, int], Tensor | None] = field(default_factory=dict[Any, Any])

    def add(self, effect: Tensor) -> None:
        """``effect`` is ‖ΔW_i x_t‖², (rows, tokens), 0 for tokens that do not count. Zero rows are
        ignored."""
        mean, length = effect.mean(1, keepdim=True), effect.shape[1]
        if length not in self._sums:
            self._sums[length] = torch.zeros_like(effect), torch.zeros_like(mean)
        total, count = self._sums[length]
        total += torch.where(mean > 0, effect / mean.clamp(min=1e-30), 0.0)
        count += (mean > 0).to(effect)

    def weights(self, tensor: Hashable, alive: Set[Hashable], length: int) -> Tensor | None:
        """(rows, tokens), or None if all count equally; the same for all sites that see equally
        many tokens of the ``tensor`` with this key. ``alive`` are keys that may occur again."""
        key = tensor, length
        if key not in self._weights:
            weights = None
            if length in self._sums:
                total, count = self._sums[length]
                mean = total / count.clamp(min=1)
                weights = torch.where(count > 0, 1 - self.share + self.share * mean, 1.0)
            self._weights = {k: of for k, of in self._weights.items() if k[0] in alive}
            self._weights[key] = weights
        return self._weights[key]


@dataclass(frozen=True)
class Observation:
    """What the rows of one ``concept`` in a micro-batch show at one site, before the merged change
    is added.

    ``inputs``, ``outputs`` and ``stream`` are the site's own tensors, (copies, rows, …), which the
    model may change later: reference rows, with the concept's change in their outputs, and merged
    rows (with one copy these are the reference rows). ``stream`` is the residual stream to which
    the output will be added, shaped like ``outputs`` (None: unknown), and ``gate``, (copies, rows,
    out), multiplies the output before that, with ``normed`` after an RMS norm. ``strengths``,
    (copies, rows), multiply the tokens of ``inputs`` (None: 1). ``changes`` are the LoRAs' at the
    site.

    ``sampling`` selects some of every row's tokens; ``mask``, (rows, tokens), is True for those
    that count (None: all). ``weights``, (rows, tokens), are the values of ``saliency`` here (None:
    all count equally). ``group`` is the same for sites that received the same tensor; ``alive``
    lists the groups that may still occur; ``call`` counts the site's earlier calls in this forward.

    Tokens are computed on demand, in ``dtype``, each multiplied by the root of its weight:
    ``merged`` X̃ and ``reference`` X, (tokens, in); ``target`` T and ``output``, the whole output
    (W0 + ΔW_i) X, (tokens, out). X̃ has only the inputs in ``columns`` (None: all).
    """

    name: str
    site: Site
    changes: SiteChanges
    concept: int
    inputs: Tensor
    outputs: Tensor
    sampling: TokenSampling
    group: Group
    alive: Set[Group]
    call: int
    mask: Tensor | None = None
    stream: Tensor | None = None
    gate: Tensor | None = None
    normed: bool = False
    strengths: Tensor | None = None
    saliency: Saliency | None = None
    weights: Tensor | None = None
    dtype: torch.dtype = torch.float32
    columns: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.site.length(self.outputs[0])

    def gathered(self) -> Observation:
        """A copy with only the tokens that ``sampling`` selects."""
        picked = self.sampling.indices(self.length, self.site.shape[1])
        if picked is None or self.sampling.whole is not None:
            return self

        def narrow(tensor: Tensor, flatten: Callable[[Tensor], Tensor]) -> Tensor:
            parts = [_selected(flatten(part), picked) for part in tensor]
            tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
            return tokens.reshape(*tensor.shape[:2], -1, tokens.shape[-1])

        def of_rows(values: Tensor | None) -> Tensor | None:
            """(rows, tokens), restricted to the selected ones."""
            return (
                values if values is None else _selected(values.flatten(), picked).reshape(rows, -1)
            )

        rows, key = self.outputs.shape[1], (self.group, self.site.geometry)
        inputs = self.sampling.gathered.get(key)
        if inputs is None:  # not of another site that received it
            inputs = self.sampling.gathered[key] = narrow(self.inputs, self.site.tokens)
        return replace(
            self,
            site=Site(self.site.shape),
            inputs=inputs,
            outputs=narrow(self.outputs, self.site.outputs),
            stream=None if self.stream is None else narrow(self.stream, self.site.outputs),
            mask=of_rows(self.mask),
            weights=of_rows(self.weights),
            sampling=replace(self.sampling, whole=self.length),
        )

    @cached_property
    def merged(self) -> Tensor:
        tokens = self._inputs(-1)
        if self.columns is not None:
            columns = self.columns.to(tokens.device, non_blocking=tokens.is_cuda)
            tokens = tokens.index_select(1, columns)
        return self._weighted(tokens)

    @property
    def reference(self) -> Tensor:
        return self._weighted(self._inputs(0))

    @property
    def output(self) -> Tensor:
        return self._weighted(self._counted(self.site.outputs(self.outputs[0])))

    @property
    def target(self) -> Tensor:
        """(W0 + ΔW_i) X minus W0 X̃, both with the layer's bias, plus the drift d = h_i − h̃_i, the
        difference between LoRA i's residual stream and the merged rows'. Behind a gate g the output
        y is what minimises ‖g̃ y − g_i y_i − d‖² / ‖h̃‖² + ε² ‖y − y_i‖² / ‖y_i‖² for every token:
        y_i + (d + (g_i − g̃) y_i) g̃ / (g̃² + ε² ‖h̃‖² / ‖y_i‖²). So a layer that adds little to
        its stream repairs little. A norm between them belongs to the gates, at the size that y_i
        has."""
        full, *others = (self._counted(self.site.outputs(copy)) for copy in self.outputs)
        base = full  # W0 X̃
        if others:
            base = others[0]
        elif (change := self.changes[self.concept]) is not None:
            base = full - self._counted(self._changed(change))
        target = full.to(self.dtype) - base.to(self.dtype)
        if self.stream is None or not others:
            return self._weighted(target)
        reference, stream = (self._counted(self.site.outputs(copy)) for copy in self.stream)
        drift = (reference - stream).to(self.dtype)
        if self.gate is None:
            return self._weighted(target.add_(drift))
        each = torch.arange(self.outputs.shape[1], device=self.gate.device)
        each = self._counted(each.repeat_interleave(self.length))
        own, merged = (of_rows[each].to(self.dtype) for of_rows in self.gate)
        full, stream = full.to(self.dtype), stream.to(self.dtype)
        size = full.square().mean(1, keepdim=True)
        if self.normed:
            norm = size.sqrt().clamp(min=1e-6)
            own, merged = own / norm, merged / norm
        least = _REPAIR**2 * stream.square().mean(1, keepdim=True) / size.clamp(min=1e-30)
        missing = drift + (own - merged) * full
        return self._weighted(target.add_(missing * merged / (merged.square() + least)))

    @property
    def count(self) -> int:
        """The number of tokens that count."""
        counting = self._counting()
        return self.outputs.shape[1] * self.length if counting is None else len(counting)

    def effect(self, change: LowRank) -> Tensor:
        """‖ΔW x‖² for every token of the reference rows, (rows, tokens), 0 if masked."""
        added = self._changed(change)
        added = added.to(torch.promote_types(added.dtype, torch.float32))
        effect = added.square().sum(1).reshape(self.outputs.shape[1], -1)
        return effect if self.mask is None else effect * self.mask

    def _changed(self, change: LowRank) -> Tensor:
        """ΔW x for the reference rows, (tokens, out)."""
        inputs = self.inputs[0]
        delta = self.site.delta(change.to(inputs.dtype, inputs.device), inputs)
        strengths = None if self.strengths is None else self.strengths[0]
        return self.site.outputs(by_row(delta, strengths))

    def _inputs(self, copy: int) -> Tensor:
        """X, or X̃, in the model's dtype; for a convolution, tokens are patches."""
        tokens = self._counted(self.site.tokens(self.inputs[copy]))
        if self.strengths is None:
            return tokens
        of_tokens = self.strengths[0].to(tokens).repeat_interleave(self.length)
        return tokens * self._counted(of_tokens[:, None])

    def _counted(self, tokens: Tensor) -> Tensor:
        """Those of all ``tokens`` of the rows that count."""
        return _selected(tokens, self._counting())

    def _counting(self) -> Tensor | None:
        """Indices of the tokens that count; None: all."""
        chosen = self.sampling.indices(self.length, self.site.shape[1])
        if self.mask is None:
            return chosen
        mask = self.mask.reshape(-1)
        if chosen is None:
            return mask.nonzero().flatten()
        chosen = chosen.to(mask.device)
        return chosen[mask[chosen]]

    def _weighted(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.dtype)
        if self.weights is None:
            return tokens
        return tokens * self._counted(self.weights.reshape(-1, 1)).to(tokens).sqrt()


def _selected(tokens: Tensor, chosen: Tensor | None) -> Tensor:
    """(tokens, …), reduced to the ``chosen`` ones; None: all."""
    if chosen is None:
        return tokens
    return tokens.index_select(0, chosen.to(tokens.device, non_blocking=True))
