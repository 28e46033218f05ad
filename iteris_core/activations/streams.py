"""Residual streams of a model that gates what it adds, found by running it.

A block adds z − h = g ⊙ y to its stream, with y a layer's output and g the same for all tokens of a
row. Which layers do so, and where the run has h and g, is not listed by architecture: h and z are
tensors that modules receive or return, and g is a part of one that has no tokens, perhaps through
tanh, plus a constant. An RMS norm may lie between: z − h = g ⊙ w ⊙ y / rms(y). A layer for which no
such h, z and g are found has no stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .memory import tensors_in

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
class Gate:
    """g, (rows, channels): ``part`` number of a row's values at ``source``, of as many parts as
    there are of ``constant``'s size, through ``form``, plus ``constant``. Without a ``source`` it
    is the constant."""

    constant: Tensor
    source: Source | None = None
    part: int = 0
    form: Callable[[Tensor], Tensor] = torch.clone

    def of(self, values: Tensor | None, rows: int) -> Tensor:
        if values is None:
            return self.constant.expand(rows, -1)
        part = values.flatten(1).split(len(self.constant), 1)[self.part]
        return self.form(part.float()) + self.constant.to(values.device)


@dataclass(frozen=True)
class Stream:
    """Where a forward has the stream to which a site's output is added, and the ``gate`` on the
    output (None: it is added as it is). ``norm`` is the weight of an RMS norm before the gate,
    (channels,)."""

    source: Source
    gate: Gate | None = None
    norm: Tensor | None = None

    def gates(self, values: Tensor | None, rows: int) -> Tensor | None:
        """g, with a norm's weight, (rows, channels); None if the output is added as it is."""
        gate = None if self.gate is None else self.gate.of(values, rows)
        if self.norm is None:
            return gate
        norm = self.norm.to(values.device if values is not None else self.norm.device)
        return norm.expand(rows, -1) if gate is None else gate * norm

    @property
    def sources(self) -> list[Source]:
        of_gate = self.gate.source if self.gate is not None else None
        return [self.source] if of_gate is None else [self.source, of_gate]


def find_streams(
    run: Callable[[], None], rows: int, sites: Mapping[str, nn.Module]
) -> dict[str, Stream]:
    """Site → its stream, from ``run``, a forward of two ``rows`` or more that differ in timestep
    and prompt."""
    names = {module: site for site, module in sites.items()}
    roots: list[nn.Module] = []  # the first module of the forward that contains a site

    def see(module: nn.Module, args: Any) -> None:
        if not roots and not names.keys().isdisjoint(module.modules()):
            roots.append(module)

    with nn.modules.module.register_module_forward_pre_hook(see):
        run()
    if not roots:
        return {}
    watch = _Watch(rows, names)
    with ExitStack() as stack:
        for module in roots[0].modules():
            stack.enter_context(module.register_forward_pre_hook(watch.before, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(watch.after))
        for block in _blocks(roots[0]):
            stack.enter_context(block.register_forward_pre_hook(watch.enter, prepend=True))
            stack.enter_context(block.register_forward_hook(watch.leave))
        run()
    return watch.found


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from child.children()
        else:
            yield from _blocks(child)


@dataclass(frozen=True)
class _Seen:
    """A few tokens of a tensor, (rows, some, channels), of so many ``tokens``, seen as ``turn``."""

    source: Source | None
    values: Tensor
    tokens: int
    turn: int


@dataclass
class _Watch:
    """``found`` are the streams; ``vectors`` have no tokens, the other tensors are the current
    block's."""

    rows: int
    sites: Mapping[nn.Module, str]
    found: dict[str, Stream] = field(default_factory=dict[str, Stream])
    _vectors: list[tuple[int, Source, Tensor]] = field(default_factory=list[Any])
    _streams: list[_Seen] = field(default_factory=list[_Seen])
    _outputs: list[tuple[str, _Seen]] = field(default_factory=list[tuple[str, _Seen]])
    _norms: list[tuple[Tensor, _Seen]] = field(default_factory=list[tuple[Tensor, _Seen]])
    _noise: float = 0.0
    _turn: int = 0
    _inside: bool = False

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for number, tensor in enumerate(tensors_in((args, kwargs))):
            self._see(Source(module, number), tensor)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if (site := self.sites.get(module)) is not None and self._inside:
            seen = self._sampled(None, output)
            if seen is not None:
                self._outputs.append((site, seen))
        if self._inside and "norm" in type(module).__name__.lower():
            given, made = (self._sampled(None, some) for some in (args[0], output))
            if given is not None and made is not None:
                self._norms.append((given.values, made))
        for number, tensor in enumerate(tensors_in(output)):
            self._see(Source(module, number, returned=True), tensor, stream=False)

    def enter(self, module: nn.Module, args: Any) -> None:
        self._inside = True
        self._streams, self._outputs, self._norms = [], [], []

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        given = [t for t in tensors_in(output) if t.ndim >= 3 and len(t) == self.rows]
        alike = [t for t in given if t.ndim == 3]
        pairs = [(a, b) for a in alike for b in alike if a is not b and a.shape[2] == b.shape[2]]
        for tensor in [*given, *(torch.cat(pair, 1) for pair in pairs)]:
            if (seen := self._sampled(None, tensor)) is not None:
                self._streams.append(seen)
        for site, output in self._outputs:
            stream = self._stream_of(output)
            if stream is None and (normed := self._normed(output.values)) is not None:
                seen, norm = normed
                stream = self._stream_of(seen)
                stream = None if stream is None else replace(stream, norm=norm)
            if stream is not None:
                self.found.setdefault(site, stream)
        self._inside = False
        self._streams, self._outputs = [], []

    def _see(self, source: Source, tensor: Tensor, *, stream: bool = True) -> None:
        if not tensor.is_floating_point() or tensor.ndim < 2 or len(tensor) != self.rows:
            return
        if tensor.numel() <= _PARTS * self.rows * tensor.shape[-1]:
            self._turn += 1
            self._vectors.append((self._turn, source, tensor.detach().flatten(1).clone()))
        if not (stream and self._inside):
            return
        seen = self._sampled(source, tensor)
        if seen is not None and not any(
            seen.tokens == one.tokens
            and seen.values.dtype == one.values.dtype
            and torch.equal(seen.values, one.values)
            for one in self._streams
        ):
            self._streams.append(seen)

    def _sampled(self, source: Source | None, tensor: Any) -> _Seen | None:
        if not isinstance(tensor, Tensor) or tensor.ndim < 3 or len(tensor) != self.rows:
            return None
        tensor = tensor.detach().flatten(1, -2)
        if not tensor.is_floating_point() or tensor.shape[1] < _LEAST_TOKENS:
            return None
        self._turn += 1
        self._noise = max(self._noise, torch.finfo(tensor.dtype).eps)
        step = max(1, tensor.shape[1] // _TOKENS)
        return _Seen(source, tensor[:, ::step].clone(), tensor.shape[1], self._turn)

    def _normed(self, y: Tensor) -> tuple[_Seen, Tensor] | None:
        """What an RMS norm returned for ``y``, and the norm's weight."""
        for given, seen in self._norms:
            if given.shape != y.shape or given.dtype != y.dtype or not torch.equal(given, y):
                continue
            y, wanted = y.float(), seen.values.float()
            even = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            norm = (wanted * even).sum((0, 1)) / even.square().sum((0, 1)).clamp(min=1e-30)
            if _off(norm * even, wanted) <= max(1e-2, 2 * self._noise) * float(wanted.norm()):
                return seen, norm
        return None

    def _stream_of(self, output: _Seen) -> Stream | None:
        """The stream to which a layer's ``output`` y is added: h before it, z after it."""
        alike = [
            one
            for one in self._streams
            if one.tokens == output.tokens and one.values.shape == output.values.shape
        ]
        before = [one for one in reversed(alike) if one.turn < output.turn and one.source]
        after = [one for one in alike if one.turn > output.turn]
        for h in before:
            for z in after:
                fitted = _fitted(h.values, z.values, output.values, self._noise)
                if fitted is None or h.source is None:
                    continue
                gate, off = fitted
                if _off(gate, torch.ones_like(gate)) <= off:
                    return Stream(h.source)
                known = self._known(gate, off, output.turn)
                return None if known is None else Stream(h.source, known)
        return None

    def _known(self, gate: Tensor, off: float, turn: int) -> Gate | None:
        """Where the run has these values, (rows, channels), before that ``turn``; ``off`` is the
        norm of their error. The simplest explanation within it: a part of a tensor, a constant, a
        part plus a constant."""
        width, mean = gate.shape[1], gate.mean(0)
        parts = [
            (form(part), source, number, form)
            for seen, source, values in self._vectors
            if seen < turn and values.shape[1] and values.shape[1] % width == 0
            for number, part in enumerate(values.float().split(width, 1))
            for form in (torch.clone, torch.tanh)
        ]
        found = min(parts, key=lambda of: _off(gate, of[0]), default=None)
        if found is not None and _off(gate, found[0]) <= off:
            return Gate(torch.zeros_like(mean), *found[1:])
        if _off(gate, mean.expand_as(gate)) <= off:
            return Gate(mean)
        found = min(parts, key=lambda of: float((gate - of[0]).std(0).norm()), default=None)
        if found is None:
            return None
        constant = (gate - found[0]).mean(0)
        near = _off(gate, found[0] + constant) <= off
        return Gate(constant, *found[1:]) if near else None


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
