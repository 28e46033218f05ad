"""The inputs and outputs of one micro-batch at one site, as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..lora import LowRank, SiteChanges
from .site import Site, by_row
from .token_sampling import Saliency, TokenSampling

Group = tuple[str, int]
"""Identifies a tensor as a site received it: its stage, and a number. An in-place change of the
tensor gives it another number."""

_REPAIR = 0.3
"""ε: a layer that adds less than this share of its stream hardly repairs."""


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

    def weighed(self) -> Observation:
        """A copy with the current weights of its tokens."""
        if self.saliency is None:
            return self
        length = self.site.length(self.outputs)
        return replace(self, weights=self.saliency.weights(self.group, self.alive, length))

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

    def input_tokens(self, start: int, stop: int, *, merged: bool = False) -> Tensor:
        """Inputs of the reference rows ``start`` to ``stop``, or of the merged rows, (tokens, in),
        without masked tokens; for a convolution, tokens are patches."""
        tokens = self._tokens(self.site.tokens, self.inputs, start, stop, merged)
        if self.strengths is None:
            return tokens
        of_rows = self.strengths[start:stop].to(tokens)
        each = self.site.length(self.outputs)
        return tokens * self.chosen(of_rows.repeat_interleave(each)[:, None], start, stop)

    def output_tokens(self, start: int, stop: int, *, merged: bool = False) -> Tensor:
        """The outputs for :meth:`input_tokens`, (tokens, out)."""
        return self._tokens(self.site.outputs, self.outputs, start, stop, merged)

    def stream_tokens(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """The residual stream of the reference rows and of the merged ones, (tokens, out); None if
        there is no drift to remove."""
        if self.stream is None or self.copies == 1:
            return None
        flatten, stream = self.site.outputs, self.stream
        own = self._tokens(flatten, stream, start, stop, False)
        return own, self._tokens(flatten, stream, start, stop, True)

    def gates(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """The gates of the reference rows and of the merged ones, (tokens, out), for
        :meth:`output_tokens`; None if there are none."""
        if self.gate is None:
            return None
        rows = torch.arange(start, stop).repeat_interleave(self.site.length(self.outputs))
        rows = self.chosen(rows, start, stop).to(self.gate.device)
        return self.gate[rows], self.gate[self.rows + rows]

    def count(self, start: int, stop: int) -> int:
        """The number of tokens of :meth:`input_tokens`."""
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

    def _tokens(
        self,
        flatten: Callable[[Tensor], Tensor],
        tensor: Tensor,
        start: int,
        stop: int,
        merged: bool,
    ) -> Tensor:
        offset = self.rows if merged and self.copies == 2 else 0
        return self.chosen(flatten(tensor[offset + start : offset + stop]), start, stop)

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
        tokens = self.shown.input_tokens(self.start, self.stop, merged=True)
        if self.inputs is not None:
            tokens = tokens.index_select(1, self.inputs.to(tokens.device))
        return self._weighted(tokens)

    @property
    def reference(self) -> Tensor:
        return self._weighted(self.shown.input_tokens(self.start, self.stop))

    @property
    def output(self) -> Tensor:
        return self._weighted(self.shown.output_tokens(self.start, self.stop))

    @property
    def target(self) -> Tensor:
        """(W0 + ΔW_i) X minus W0 X̃, both with the layer's bias, plus the drift d = h_i − h̃_i, the
        difference between LoRA i's residual stream and the merged rows'. Behind a gate g the output
        y is what minimises ‖g̃ y − g_i y_i − d‖² / ‖h̃‖² + ε² ‖y − y_i‖² / ‖y_i‖² for every token:
        y_i + (d + (g_i − g̃) y_i) g̃ / (g̃² + ε² ‖h̃‖² / ‖y_i‖²). So a layer that adds little to
        its stream repairs little. A norm between them belongs to the gates, at the size that y_i
        has."""
        full = self.shown.output_tokens(self.start, self.stop)
        rows, base = (self.start, self.stop), full  # W0 X̃
        if self.shown.copies == 2:
            base = self.shown.output_tokens(*rows, merged=True)
        elif (change := self.changes[self.concept]) is not None:
            base = full - self.shown.chosen(self.shown.changed(change, *rows), *rows)
        target = full.to(self.dtype) - base.to(self.dtype)
        streams = self.shown.stream_tokens(self.start, self.stop)
        if streams is None:
            return self._weighted(target)
        drift = (streams[0] - streams[1]).to(self.dtype)
        gates = self.shown.gates(self.start, self.stop)
        if gates is None:
            return self._weighted(target.add_(drift))
        own, merged = (gate.to(self.dtype) for gate in gates)
        full, stream = full.to(self.dtype), streams[1].to(self.dtype)
        size = full.square().mean(1, keepdim=True)
        if self.shown.normed:
            norm = size.sqrt().clamp(min=1e-6)
            own, merged = own / norm, merged / norm
        least = _REPAIR**2 * stream.square().mean(1, keepdim=True) / size.clamp(min=1e-30)
        missing = drift + (own - merged) * full
        return self._weighted(target.add_(missing * merged / (merged.square() + least)))

    def _weighted(self, tokens: Tensor) -> Tensor:
        tokens, weights = tokens.to(self.dtype), self.shown.weights
        if weights is None:
            return tokens
        weights = weights[self.start : self.stop].reshape(-1, 1)
        return tokens * self.shown.chosen(weights, self.start, self.stop).to(tokens).sqrt()
