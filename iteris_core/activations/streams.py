"""Residual streams of a model that gates what it adds, found by running it.

A block adds z − h = g ⊙ y to its stream, with y a layer's output and g the same for all tokens of a
row. Which layers do so, and where the run has h and g, is not listed by architecture: h and z are
tensors that modules receive or return, and g is a part of one that has no tokens, perhaps through
tanh, plus a constant. An RMS norm may lie between: z − h = g ⊙ w ⊙ y / rms(y). A layer for which no
such h, z and g are found has no stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..linalg import on_host
from .memory import tensors_in
from .trace import hooked

_TOKENS, _LEAST_TOKENS = 512, 4
"""How many tokens of a tensor are compared, and fewest that it must have."""
_FEW, _TRIED = 16, 4
"""Of these tokens, those by which pairs of tensors are chosen, and how many pairs are compared."""
_PARTS = 16
"""Most parts of a tensor without tokens, each as wide as the tensor's last dimension."""
_FORMS = torch.clone, torch.tanh
"""What a gate's values are of a part of a tensor."""
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


@dataclass(frozen=True, eq=False)
class _Sample:
    """A few tokens of a tensor, (rows, some, channels), seen as ``turn``. Its ``kind`` is how many
    tokens there are and the shape of these; equal tensors have equal ``sums``, (2,)."""

    source: Source | None
    values: Tensor
    kind: tuple[int, ...]
    turn: int
    sums: Tensor


@dataclass(frozen=True)
class _Fit:
    """A ``gate`` g, (rows, channels), of z − h = g ⊙ y, where a run has h at ``source`` and y was
    seen as ``turn``, behind a ``norm``; :func:`_error` judges it by ``numbers``, scalars, of so
    many ``values``."""

    source: Source
    turn: int
    gate: Tensor
    values: int
    numbers: Tensor
    norm: Tensor | None


@dataclass
class _Finder:
    """``vectors`` have no tokens; the other tensors are the current block's: those that may be the
    stream, the outputs of sites, and what norms received and returned. A block's numbers are read
    from the device four times: which tensors are equal, which pairs are near, which fit, and what
    explains the gates."""

    rows: int
    sites: Mapping[nn.Module, str]
    blocks: set[nn.Module]
    streams: dict[str, Stream] = field(default_factory=dict[str, Stream])
    _vectors: list[tuple[int, Source, Tensor]] = field(default_factory=list[Any])
    _hidden: list[_Sample] = field(default_factory=list[_Sample])
    _outputs: list[tuple[str, _Sample]] = field(default_factory=list[tuple[str, _Sample]])
    _norms: list[tuple[_Sample, _Sample]] = field(default_factory=list[tuple[_Sample, _Sample]])
    _received: dict[int, tuple[ref[Tensor], int]] = field(default_factory=dict[Any, Any])
    _noise: float = 0.0
    _turn: int = 0
    _inside: bool = False

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in self.blocks:
            self._inside = True
            self._hidden, self._outputs, self._norms, self._received = [], [], [], {}
        for number, tensor in enumerate(tensors_in((args, kwargs))):
            self._note_vector(Source(module, number), tensor)
            again = not self._inside or self._was_sampled(tensor)
            sample = None if again else self._sample(tensor, Source(module, number))
            if sample is not None:
                self._hidden.append(sample)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._inside:
            if module in self.sites and (sample := self._sample(output)) is not None:
                self._outputs.append((self.sites[module], sample))
            if "norm" in type(module).__name__.lower():
                received, returned = self._sample(args[0]), self._sample(output)
                if received is not None and returned is not None:
                    self._norms.append((received, returned))
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
        seen = [*self._hidden, *(y for _, y in self._outputs), *(x for x, _ in self._norms)]
        sums = on_host([sample.sums for sample in seen])
        keys = {s: (s.kind, s.values.dtype, *n.tolist()) for s, n in zip(seen, sums, strict=True)}
        distinct = {keys[first]: first for first in reversed(self._hidden)}
        befores = sorted(distinct.values(), key=lambda sample: -sample.turn)
        afters = [*reversed(befores), *(sample for sample in samples if sample is not None)]
        pairs: list[Any] = []
        for site, y in self._outputs:
            norms = [
                (z, *_norm(y, z)) for x, z in self._norms if keys[x] == keys[y] and z.kind == y.kind
            ]
            options: list[Any] = [(y, None, y.values.new_zeros(2)), *norms]
            for of, norm, misfit in options:
                first = [h for h in befores if h.kind == of.kind and h.turn <= of.turn]
                second = [z for z in afters if z.kind == of.kind and z.turn > of.turn]
                if first and second:
                    pairs.append((site, of, norm, misfit, first, second))
        near = on_host([_near(of, hs, zs, self._noise) for _, of, _, _, hs, zs in pairs])
        fits = [
            (site, _fitted(hs[h], zs[z], of, norm, misfit))
            for (site, of, norm, misfit, hs, zs), are in zip(pairs, near, strict=True)
            for h, z in are.nonzero()[:_TRIED].tolist()
        ]
        found: dict[tuple[str, bool], tuple[_Fit, float]] = {}
        read = on_host([fit.numbers for _, fit in fits])
        for (site, fit), numbers in zip(fits, read, strict=True):
            off = _error(fit, numbers.tolist(), self._noise)
            if off is not None:
                found.setdefault((site, fit.norm is None), (fit, off))
        misfits = [_misfits(fit, self._vectors) for fit, _ in found.values()]
        errors = iter(on_host([of for ways in misfits for of in ways]))
        for (site, _), (fit, off) in found.items():
            ways = [next(errors) for _ in range(4)]
            near = (n for n, of in enumerate(ways) if len(of) and float(of.min()) <= off)
            if (way := next(near, None)) is not None:
                stream = _stream(fit, self._vectors, way, int(ways[way].argmin()))
                self.streams.setdefault(site, replace(stream, norm=fit.norm))
        self._inside = False
        self._hidden, self._outputs = [], []

    def _note_vector(self, source: Source, tensor: Tensor) -> None:
        if not tensor.is_floating_point() or tensor.ndim < 2 or len(tensor) != self.rows:
            return
        if tensor.numel() <= _PARTS * self.rows * tensor.shape[-1]:
            self._turn += 1
            self._vectors.append((self._turn, source, tensor.detach().flatten(1).clone()))

    def _was_sampled(self, tensor: Tensor) -> bool:
        """Whether an earlier module of the block received it unchanged."""
        version = 0 if tensor.is_inference() else tensor._version
        before = self._received.get(id(tensor))
        self._received[id(tensor)] = ref(tensor), version
        return before is not None and before[0]() is tensor and before[1] == version

    def _sample(self, tensor: Any, source: Source | None = None) -> _Sample | None:
        if not isinstance(tensor, Tensor) or tensor.ndim < 3 or len(tensor) != self.rows:
            return None
        tensor = tensor.detach().flatten(1, -2)
        if not tensor.is_floating_point() or tensor.shape[1] < _LEAST_TOKENS:
            return None
        self._turn += 1
        self._noise = max(self._noise, torch.finfo(tensor.dtype).eps)
        step = max(1, tensor.shape[1] // _TOKENS)
        values = tensor[:, ::step].clone()
        flat = values.float().flatten()
        sums = torch.stack(
            [flat.norm(), flat @ torch.linspace(1, 2, len(flat), device=flat.device)]
        )
        return _Sample(source, values, (tensor.shape[1], *values.shape), self._turn, sums)


def _fitted(h: _Sample, z: _Sample, y: _Sample, norm: Tensor | None, misfit: Tensor) -> _Fit:
    """``misfit`` are the norms of the error of the ``norm`` and of what it returned."""
    assert h.source is not None
    before, after, output = h.values.float(), z.values.float(), y.values.float()
    added, energy = after - before, output.square().sum(1).clamp(min=1e-30)
    gate = (added * output).sum(1) / energy
    norms = [of.norm() for of in (added - gate[:, None] * output, added, after, gate)]
    # Tokens that are alike, as padding, are rounded alike, and the fit hides it.
    sums = (1 / energy).sum(), (after.square().sum(1) / energy).sum()
    numbers = torch.stack([*norms, *(of.sqrt() for of in sums), *misfit])
    return _Fit(h.source, y.turn, gate, added.numel(), numbers, norm)


def _error(fit: _Fit, numbers: Sequence[float], noise: float) -> float | None:
    """The norm of the gate's error; None if anything but rounding is left."""
    left, whole, after, size, inverse, alike, misfit, returned = numbers
    if misfit > max(1e-2, 2 * noise) * returned:
        return None
    if left > 1e-3 * whole + 0.6 * noise * after or left > _MOST_LEFT * whole:
        return None
    error = 4 * left * inverse / fit.values**0.5
    off = max(error, min(noise / 2 * alike, _ALIKE * size)) + 1e-3 * size
    return off if error <= _MOST_LEFT * size else None


def _parts(
    fit: _Fit, vectors: Sequence[tuple[int, Source, Tensor]]
) -> Iterator[tuple[Source, Tensor]]:
    """The ``vectors`` that the run has before a ``fit``, as parts of the gate's width, (parts,
    rows, channels), float32."""
    width = fit.gate.shape[1]
    for seen, origin, values in vectors:
        if seen < fit.turn and values.shape[1] and values.shape[1] % width == 0:
            yield origin, values.float().unflatten(1, (-1, width)).movedim(1, 0)


def _misfits(fit: _Fit, vectors: Sequence[tuple[int, Source, Tensor]]) -> list[Tensor]:
    """What the gate of a ``fit`` may be, the simplest first, by the norms of errors: one, a part in
    each of its forms, a constant, a part plus a constant."""
    gate = fit.gate
    parts = torch.cat([gate.new_empty(0, *gate.shape), *(of for _, of in _parts(fit, vectors))])
    gap = gate - torch.stack([form(parts) for form in _FORMS], 1).flatten(0, 1)
    return [
        (gate - 1).norm()[None],
        gap.flatten(1).norm(dim=1),
        (gate - gate.mean(0)).norm()[None],
        # `Tensor.std` is a hundred times slower on a CPU.
        (gap - gap.mean(1, keepdim=True)).flatten(1).norm(dim=1),
    ]


def _stream(
    fit: _Fit, vectors: Sequence[tuple[int, Source, Tensor]], way: int, index: int
) -> Stream:
    """The stream with the gate that the ``index``-th of a ``way`` of :func:`_misfits` is."""
    if way in (0, 2):
        return Stream(fit.source, None if way == 0 else fit.gate.mean(0))
    place, form = divmod(index, len(_FORMS))
    for origin, parts in _parts(fit, vectors):
        if place < len(parts):
            constant = (fit.gate - _FORMS[form](parts[place])).mean(0) * (way == 3)
            return Stream(fit.source, constant, origin, place, _FORMS[form])
        place -= len(parts)
    raise IndexError(index)


def _near(y: _Sample, hs: Sequence[_Sample], zs: Sequence[_Sample], noise: float) -> Tensor:
    """Which z − h may be g ⊙ y by a few tokens, (hs, zs): g of all pairs at once, since what y does
    not explain of z and h is then the same."""
    step = max(1, y.values.shape[1] // _FEW)
    output, first, second = (
        torch.stack([sample.values[:, ::step].float() for sample in samples])
        for samples in ([y], hs, zs)
    )
    energy = output.square().sum(2, keepdim=True).clamp(min=1e-30)
    rest = [x - (x * output).sum(2, keepdim=True) / energy * output for x in (first, second)]
    pairs = (rest[0].flatten(1), rest[1].flatten(1)), (first.flatten(1), second.flatten(1))
    left, whole = (
        torch.cdist(*pair, compute_mode="donot_use_mm_for_euclid_dist") for pair in pairs
    )
    size = second.flatten(1).norm(dim=1)
    return (left <= 2e-3 * whole + 1.2 * noise * size) & (left <= _MOST_LEFT * whole)


def _norm(y: _Sample, returned: _Sample) -> tuple[Tensor, Tensor]:
    """The weight of an RMS norm that ``returned`` what it made of ``y``; the norms of its error and
    of what it returned, (2,)."""
    values, wanted = y.values.float(), returned.values.float()
    even = values * (values.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    norm = (wanted * even).sum((0, 1)) / even.square().sum((0, 1)).clamp(min=1e-30)
    return norm, torch.stack([(norm * even - wanted).norm(), wanted.norm()])
