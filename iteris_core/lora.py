"""Low-rank changes of a base model's weights, and operations on them that need no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from .architectures.record import BaseModel
from .errors import MismatchError


@dataclass(frozen=True)
class LowRank:
    """One change of one site: ``ΔW = up @ down``, with any scale folded in.

    ``up`` is (out, rank). ``down`` is (rank, in); for a Conv2d it is (rank, in·kh·kw) in the order
    of ``weight.flatten(1)``, and ``kernel`` holds (kh, kw). ``scale`` is the factor in ``up`` that
    its file stores apart (alpha / rank), by which the file can be written again bit for bit; a
    computed change has 1.
    """

    up: Tensor
    down: Tensor
    kernel: tuple[int, int] | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise MismatchError(
                f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)} do not form a "
                "product; pass up as (out, rank) and down as (rank, in)."
            )

    def __repr__(self) -> str:
        out, wide = self.shape
        kernel = "" if self.kernel is None else f", kernel {self.kernel}"
        return f"<LowRank {out} x {wide}, rank {self.rank}{kernel}, {self.up.dtype}>"

    @classmethod
    def whole(cls, dense: Tensor, kernel: tuple[int, int] | None = None) -> LowRank:
        """An exact factorisation of ``dense`` ΔW, (out, in), with an identity on its shorter side;
        ``kernel`` is a convolution's (height, width)."""
        out, width = dense.shape
        if width <= out:
            return cls(dense, torch.eye(width, dtype=dense.dtype, device=dense.device), kernel)
        return cls(torch.eye(out, dtype=dense.dtype, device=dense.device), dense, kernel)

    @classmethod
    def folded(
        cls, up: Tensor, down: Tensor, scale: float, kernel: tuple[int, int] | None = None
    ) -> LowRank:
        """ΔW = ``scale`` · ``up @ down``, as in files; ``kernel`` is a convolution's."""
        return cls(up * scale, down, kernel, scale)

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def alpha(self) -> float:
        """As in its file."""
        return self.scale * self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return self.up.shape[0], self.down.shape[1]

    def dense(self) -> Tensor:
        """ΔW, (out, in), in the factors' dtype."""
        return self.up @ self.down

    def padded(self, rank: int) -> LowRank:
        """The same change at a larger ``rank``, filled up with zeros."""
        missing = rank - self.rank
        up, down = pad(self.up, (0, missing)), pad(self.down, (0, 0, 0, missing))
        return replace(self, up=up, down=down)

    def scaled(self, factor: float) -> LowRank:
        """``factor`` · ΔW."""
        return LowRank(self.up * factor, self.down, self.kernel)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LowRank:
        """A copy with its factors in ``dtype`` and on ``device``; None keeps theirs."""
        # Not waited for: CUDA takes memory that is not pinned before it goes on.
        to_card = device is not None and torch.device(device).type == "cuda"
        up, down = (
            factor.to(device=device, dtype=dtype, non_blocking=to_card)
            for factor in (self.up, self.down)
        )
        return LowRank(up, down, self.kernel)

    @cached_property
    def is_zero(self) -> bool:
        """Whether ``up`` is zero, as at layers that no LoRA changes."""
        return not bool(self.up.any())

    def squared_norm(self) -> float:
        """‖ΔW‖²_F, from two rank × rank products in float64."""
        up, down = self.up.double(), self.down.double()
        return float(((up.mT @ up) * (down @ down.mT)).sum())


@dataclass(frozen=True)
class Lora:
    """Changes by site name, such as ``unet.mid_block.attentions.0…to_q`` or
    ``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``; ``name`` is for messages.

    ``source`` is the file's name without folders, because merged files record it; ``sha256`` is of
    its content. ``base`` is the architecture for which it was read, if known. ``notes`` list
    whatever the reader changed or left out, ``left_out`` counts the tensors. ``embeddings`` are
    (vectors, width) by name and text encoder (``clip_l``, ``clip_g``, …). ``reading`` records the
    options with which the file was read.
    """

    sites: Mapping[str, LowRank]
    name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    source: str = ""
    sha256: str = ""
    base: BaseModel | None = None
    notes: Sequence[str] = ()
    left_out: int = 0
    embeddings: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=dict[str, Mapping[str, Tensor]]
    )
    reading: Mapping[str, object] = field(default_factory=dict[str, object])

    def __repr__(self) -> str:
        ranks = sorted(self.ranks)
        rank = f", rank {ranks[0]}" if ranks else ""
        rank += f" to {ranks[-1]}" if ranks[1:] else ""
        more = f", embeddings {', '.join(self.embeddings)}" if self.embeddings else ""
        return f"<Lora {self.name!r}: {len(self.sites)} sites{rank}{more}>"

    @property
    def ranks(self) -> set[int]:
        return {change.rank for change in self.sites.values()}


def concatenate(changes: Sequence[LowRank]) -> LowRank:
    """The exact sum of ``changes``, of rank Σ r_i: factors side by side, with the scale that all of
    them have, if any. One change is itself."""
    if not changes:
        raise MismatchError("Nothing to add up: pass at least one change.")
    first = changes[0]
    if len(changes) == 1:
        return first
    if any(change.shape != first.shape or change.kernel != first.kernel for change in changes):
        shapes = [change.shape for change in changes]
        raise MismatchError(f"Changes of one site differ in shape: {shapes}. Same base model?")
    up = torch.cat([change.up for change in changes], dim=1)
    down = torch.cat([change.down for change in changes], dim=0)
    scale = first.scale if len({change.scale for change in changes}) == 1 else 1.0
    return LowRank(up, down, first.kernel, scale)


@dataclass(frozen=True)
class SiteChanges:
    """The LoRAs' changes of one site, one for each concept.

    None stands for a LoRA that does not change the site. At least one concept has a change, and all
    changes have the same shape. ``sums`` are further concepts, after the others: the indices of
    those whose changes add up to theirs. They are targets of composite rows, which count neither in
    the rank nor in the mean, and have no factors of their own.
    """

    by_concept: tuple[LowRank | None, ...]
    sums: tuple[tuple[int, ...], ...] = ()

    @staticmethod
    def of(changes: SiteChanges | Sequence[LowRank | None]) -> SiteChanges:
        return changes if isinstance(changes, SiteChanges) else SiteChanges(tuple(changes))

    def __len__(self) -> int:
        return len(self.by_concept) + len(self.sums)

    def __iter__(self) -> Iterator[LowRank | None]:
        return (self[concept] for concept in range(len(self)))

    def __getitem__(self, concept: int) -> LowRank | None:
        """A concept's change; a sum is concatenated anew each time."""
        parts = self.parts(concept)
        return concatenate(parts) if parts else None

    def parts(self, concept: int) -> list[LowRank]:
        """The changes that add up to a concept's: its own, or those of a sum."""
        sums = concept - len(self.by_concept)
        parts = (concept,) if sums < 0 else self.sums[sums]
        return [self.own[part] for part in parts if part in self.own]

    @property
    def present(self) -> dict[int, LowRank]:
        """Concept → its change, for concepts that have one, in order."""
        return {i: change for i, change in enumerate(self) if change is not None}

    @cached_property
    def own(self) -> dict[int, LowRank]:
        """The changes that are present and not sums of others."""
        return {i: change for i, change in enumerate(self.by_concept) if change is not None}

    @property
    def like(self) -> LowRank:
        """The first change; a merged change has its dtype, device and kernel."""
        return next(iter(self.own.values()))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the site as a linear map of tokens."""
        return self.like.shape

    @property
    def rank(self) -> int:
        """Σ r_i"""
        return sum(change.rank for change in self.own.values())

    @property
    def listed_rank(self) -> int:
        """Σ r_i, including sums."""
        return sum(part.rank for concept in range(len(self)) for part in self.parts(concept))

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> SiteChanges:
        return replace(self, by_concept=tuple(c and c.to(dtype, device) for c in self.by_concept))

    def at(self, inputs: Tensor) -> SiteChanges:
        """The changes restricted to the chosen ``inputs`` (indices)."""
        restricted = (
            c and LowRank(c.up, c.down[:, inputs.to(c.down.device)], c.kernel)
            for c in self.by_concept
        )
        return replace(self, by_concept=tuple(restricted))

    def weighted(self, weights: Sequence[float]) -> list[LowRank]:
        """w_i ΔW_i for concepts that have a change."""
        return [change.scaled(weights[i]) for i, change in self.own.items()]

    def stacked(self) -> LowRank:
        """[up_1 … up_N] and [down_1; …; down_N]: the sum of the changes, exactly."""
        return concatenate(list(self.own.values()))

    def mean(self, weights: Sequence[float], dtype: torch.dtype) -> LowRank:
        """Σ w_i ΔW_i / Σ w_i, exactly; Σ runs over all concepts that are not sums of others."""
        total = sum(weights[: len(self.by_concept)])
        return concatenate(self.to(dtype).weighted([weight / total for weight in weights]))


Rank = int | float
"""A number of at least 1, or the share of energy to keep, between 0 and 1."""


def rank_for(squares: Tensor, rank: Rank) -> int:
    """How many of the descending ``squares`` (energies) to keep."""
    if isinstance(rank, int):
        return min(rank, squares.numel())
    total = float(squares.sum())
    if total == 0:
        return 1
    shares = squares.cumsum(0) / total
    return min(int((shares < rank - 1e-12).sum()) + 1, squares.numel())
