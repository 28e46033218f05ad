"""Residual streams of a model that gates what it adds, found by running it.

A block adds z − h = g ⊙ y to its stream, with y a layer's output and g the same for all tokens of a
row. Which layers do so, and where the run has h and g, is not listed by architecture: h and z are
tensors that modules receive or return, and g is a part of one that has no tokens, perhaps through
tanh, plus a constant. An RMS norm may lie between: z − h = g ⊙ w ⊙ y / rms(y). A layer for which no
such h, z and g are found has no stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .memory import tensors_in
from .trace import hooked

_TOKENS, _LEAST_TOKENS = 512, 4
"""How many tokens of a tensor are compared, and fewest that it must have."""
_PARTS = 16
"""Most parts of a tensor without tokens, each as wide as the tensor's last dimension."""
_MOST_LEFT = 0.7
"""Largest share of an addition, or of a gate, that may be rounding."""
_ALIKE = 0.1
"""Largest share of a gate that the rounding of alike tokens may be."""


@dataclass(frozen=True)
class Source:
    """That number among the tensors that a ``module`` receives, or with ``returned`` returns."""

    module: nn.Module
    number: int = 0
    returned: bool = False


@dataclass(frozen=True)
class Stream:
    """Where a forward has the stream to which a site's output is added, and the gate g on the
    output: ``constant``, (channels,), plus ``form`` of a part of a row's values at ``gate``. It is
    ``part`` number, of as many as there are of the constant's size. Without a ``gate`` g is the
    constant, and without a constant the output is added as it is. ``norm`` is the weight of an RMS
    norm before the gate, (channels,)."""

    source: Source
    constant: Tensor | None = None
    gate: Source | None = None
    part: int = 0
    form: Callable[[Tensor], Tensor] = torch.clone
    norm: Tensor | None = None

    def gates(self, values: Tensor | None, rows: int) -> Tensor | None:
        """g, with a norm's weight, (rows, channels); None if the output is added as it is.
        ``values`` are those at ``gate``."""
        gate = None if self.constant is None else self.constant.expand(rows, -1)
        if gate is not None and values is not None:
            part = values.flatten(1).split(gate.shape[1], 1)[self.part]
            gate = self.form(part.float()) + gate.to(values.device)
        if self.norm is None:
            return gate
        norm = self.norm if values is None else self.norm.to(values.device)
        return norm.expand(rows, -1) if gate is None else gate * norm


def find_streams(
    run: Callable[[], None], rows: int, sites: Mapping[str, nn.Module], root: nn.Module
) -> dict[str, Stream]:
    """Site → its stream, from ``run``, a forward of ``root`` with two ``rows`` or more that differ
    in timestep and prompt."""
    finder = _Finder(rows, {module: site for site, module in sites.items()}, set(_blocks(root)))
    with hooked(root.modules(), finder.before, finder.after):
        run()
    return finder.streams


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from child.children()
        else:
            yield from _blocks(child)


@dataclass(frozen=True)
class _Sample:
    """A few tokens of a tensor, (rows, some, channels), of so many ``tokens``, seen as ``turn``."""

    source: Source | None
    values: Tensor
    tokens: int
    turn: int


@dataclass
class _Finder:
    """``vectors`` have no tokens; the other tensors are the current block's: those that may be the
    stream, the outputs of sites, and what norms received and returned."""

    rows: int
    sites: Mapping[nn.Module, str]
    blocks: set[nn.Module]
    streams: dict[str, Stream] = field(default_factory=dict[str, Stream])
    _vectors: list[tuple[int, Source, Tensor]] = field(default_factory=list[Any])
    _hidden: list[_Sample] = field(default_factory=list[_Sample])
    _outputs: list[tuple[str, _Sample]] = field(default_factory=list[tuple[str, _Sample]])
    _norms: list[tuple[Tensor, _Sample]] = field(default_factory=list[tuple[Tensor, _Sample]])
    _noise: float = 0.0
    _turn: int = 0
    _inside: bool = False

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in self.blocks:
            self._inside = True
            self._hidden, self._outputs, self._norms = [], [], []
        for number, tensor in enumerate(tensors_in((args, kwargs))):
            self._note_vector(Source(module, number), tensor)
            sample = self._sample(tensor, Source(module, number)) if self._inside else None
            if sample is not None and not any(
                sample.tokens == other.tokens
                and sample.values.dtype == other.values.dtype
                and torch.equal(sample.values, other.values)
                for other in self._hidden
            ):
                self._hidden.append(sample)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._inside:
            if module in self.sites and (sample := self._sample(output)) is not None:
                self._outputs.append((self.sites[module], sample))
            if "norm" in type(module).__name__.lower():
                received, returned = self._sample(args[0]), self._sample(output)
                if received is not None and returned is not None:
                    self._norms.append((received.values, returned))
        for number, tensor in enumerate(tensors_in(output)):
            self._note_vector(Source(module, number, returned=True), tensor)
        if module in self.blocks:
            self._leave(output)

    def _leave(self, output: Any) -> None:
        """Find the streams of a block that returned ``output``; a later block may run two of its
        tensors as one."""
        returned = [t for t in tensors_in(output) if t.ndim >= 3 and len(t) == self.rows]
        three = [t for t in returned if t.ndim == 3]
        pairs = [(a, b) for a in three for b in three if a is not b and a.shape[2] == b.shape[2]]
        samples = map(self._sample, [*returned, *(torch.cat(pair, 1) for pair in pairs)])
        self._hidden += [sample for sample in samples if sample is not None]
        for site, output in self._outputs:
            stream = self._stream_of(output)
            if stream is None and (normed := self._normed(output.values)) is not None:
                sample, norm = normed
                stream = self._stream_of(sample)
                stream = None if stream is None else replace(stream, norm=norm)
            if stream is not None:
                self.streams.setdefault(site, stream)
        self._inside = False
        self._hidden, self._outputs = [], []

    def _note_vector(self, source: Source, tensor: Tensor) -> None:
        if not tensor.is_floating_point() or tensor.ndim < 2 or len(tensor) != self.rows:
            return
        if tensor.numel() <= _PARTS * self.rows * tensor.shape[-1]:
            self._turn += 1
            self._vectors.append((self._turn, source, tensor.detach().flatten(1).clone()))

    def _sample(self, tensor: Any, source: Source | None = None) -> _Sample | None:
        if not isinstance(tensor, Tensor) or tensor.ndim < 3 or len(tensor) != self.rows:
            return None
        tensor = tensor.detach().flatten(1, -2)
        if not tensor.is_floating_point() or tensor.shape[1] < _LEAST_TOKENS:
            return None
        self._turn += 1
        self._noise = max(self._noise, torch.finfo(tensor.dtype).eps)
        step = max(1, tensor.shape[1] // _TOKENS)
        return _Sample(source, tensor[:, ::step].clone(), tensor.shape[1], self._turn)

    def _normed(self, y: Tensor) -> tuple[_Sample, Tensor] | None:
        """What an RMS norm returned for ``y``, and the norm's weight."""
        for received, sample in self._norms:
            if received.shape != y.shape or received.dtype != y.dtype:
                continue
            if not torch.equal(received, y):
                continue
            y, wanted = y.float(), sample.values.float()
            even = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            norm = (wanted * even).sum((0, 1)) / even.square().sum((0, 1)).clamp(min=1e-30)
            if _off(norm * even, wanted) <= max(1e-2, 2 * self._noise) * float(wanted.norm()):
                return sample, norm
        return None

    def _stream_of(self, output: _Sample) -> Stream | None:
        """The stream to which a layer's ``output`` y is added: h before it, z after it."""
        y = output.values
        like = [x for x in self._hidden if x.tokens == output.tokens and x.values.shape == y.shape]
        after = [z for z in like if z.turn > output.turn]
        for h in reversed(like):
            if h.source is None or h.turn > output.turn:
                continue
            for z in after:
                fitted = _fitted(h.values, z.values, y, self._noise)
                if fitted is not None:
                    return self._gated(h.source, *fitted, output.turn)
        return None

    def _gated(self, source: Source, gate: Tensor, off: float, turn: int) -> Stream | None:
        """The stream at ``source``, with where the run has the values of its ``gate``, (rows,
        channels), before that ``turn``; ``off`` is the norm of their error. The simplest
        explanation within it: one, a part of a tensor, a constant, a part plus a constant."""
        if _off(gate, torch.ones_like(gate)) <= off:
            return Stream(source)
        width, mean = gate.shape[1], gate.mean(0)
        parts = [
            (form(part), origin, number, form)
            for seen, origin, values in self._vectors
            if seen < turn and values.shape[1] and values.shape[1] % width == 0
            for number, part in enumerate(values.float().split(width, 1))
            for form in (torch.clone, torch.tanh)
        ]
        nearest = min(parts, key=lambda of: _off(gate, of[0]), default=None)
        if nearest is not None and _off(gate, nearest[0]) <= off:
            return Stream(source, torch.zeros_like(mean), *nearest[1:])
        if _off(gate, mean.expand_as(gate)) <= off:
            return Stream(source, mean)
        nearest = min(parts, key=lambda of: float((gate - of[0]).std(0).norm()), default=None)
        if nearest is None:
            return None
        constant = (gate - nearest[0]).mean(0)
        near = _off(gate, nearest[0] + constant) <= off
        return Stream(source, constant, *nearest[1:]) if near else None


def _fitted(h: Tensor, z: Tensor, y: Tensor, noise: float) -> tuple[Tensor, float] | None:
    """g of z − h = g ⊙ y, (rows, channels), and the norm of its error; None if the two differ by
    anything else than rounding."""
    h, z, y = h.float(), z.float(), y.float()
    added, energy = z - h, y.square().sum(1).clamp(min=1e-30)
    gate = (added * y).sum(1) / energy
    left, whole = float((added - gate[:, None] * y).norm()), float(added.norm())
    if left > 1e-3 * whole + 0.6 * noise * float(z.norm()) or left > _MOST_LEFT * whole:
        return None
    error = 4 * left * float((1 / energy).sum().sqrt()) / added.numel() ** 0.5
    # Tokens that are alike, as padding, are rounded alike, and the fit hides it.
    alike = noise / 2 * float((z.square().sum(1) / energy).sum().sqrt())
    size = float(gate.norm())
    off = max(error, min(alike, _ALIKE * size)) + 1e-3 * size
    return (gate, off) if error <= _MOST_LEFT * size else None


def _off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm())
