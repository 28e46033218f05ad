"""The loss of a denoiser's rows, and its gradients with respect to merged factors.

For rows r, their final outputs f and the outputs h_b of every block,

    Σ_r w_r (‖f_merged(r) − f_LoRA(r)‖² + hints · mean_b ‖h_b,merged(r) − h_b,LoRA(r)‖² / s_b).

f_LoRA is what row r's own LoRA does, as the row loads it; the base's for generic rows.
w_r is the concept's weight over the mean ‖f_LoRA − f_base‖² of its rows, but over no less than a
quarter of the concepts' mean: otherwise a LoRA that acts in the text encoders alone would rule. s_b
is the block's error before. The blocks' outputs (hints: Romero et al. 2015) tell each layer more of
a row than its end does: without them a merge fits its rows as closely, and keeps less on other
words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.gradients import Network, saved_tensors
from ..activations.memory import MemoryMeter, tensors_in
from ..activations.micro_batch import MicroBatch
from ..activations.rows import as_merged, phantoms
from ..activations.trace import alike
from ..errors import SiteError
from ..hosts.protocol import Stage
from ..lora import LowRank
from ..passes.batches import chunks
from ..passes.footprint import longest
from ..passes.job import Run
from ..passes.planner import find, replayable

_AT_ONCE = 4
"""Rows at once while effects are measured."""
_AT_OUTPUT, _LOWER, _LOWERED = 2**-6, 2**-8, 2
"""The size of the gradients at the final outputs, which in half precision neither vanish nor
overflow on their way back; what lowers it, and how often."""

_LEAST_EFFECT = 0.25
"""The least effect by which a row is weighted, as a share of the mean over the concepts."""
Hint = tuple[nn.Module, int]
"""A block's output in one of the calls of a forward."""


Outputs = tuple[Tensor, dict[Hint, Tensor]]
"""The final outputs of rows, rows first, and those of the blocks that keep rows apart."""


class Targets:
    """Outputs of rows under their own LoRAs, of which ``limit`` bytes stay in main memory."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._of_row: dict[int, Outputs] = {}

    def of(self, rows: Sequence[int], make: Callable[[Sequence[int]], Outputs]) -> Outputs:
        """The outputs of ``rows``, with those that ``make`` returns for rows that are not there."""
        missing = [row for row in rows if row not in self._of_row]
        fresh = dict[int, Outputs]()
        if missing:
            outputs = final, hints = make(missing)
            for place, row in enumerate(missing):
                fresh[row] = final[place], {hint: of[place] for hint, of in hints.items()}
                self._put(row, *fresh[row])
            if len(missing) == len(rows):
                return outputs
        finals, hints = zip(*({**self._of_row, **fresh}[row] for row in rows), strict=True)
        common = [hint for hint in hints[0] if all(hint in of for of in hints)]
        return _stacked(finals), {hint: _stacked([of[hint] for of in hints]) for hint in common}

    def _put(self, row: int, final: Tensor, hints: Mapping[Hint, Tensor]) -> None:
        size = sum(of.nbytes for of in (final, *hints.values()))
        if size <= self._left:
            self._left -= size
            of_blocks = {hint: of.to("cpu", copy=True) for hint, of in hints.items()}
            self._of_row[row] = final.to("cpu", copy=True), of_blocks


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """On a device where one of them is."""
    device = max((tensor.device for tensor in tensors), key=lambda device: device.type != "cpu")
    return torch.stack([tensor.to(device) for tensor in tensors])


def network_of(run: Run, stage: Stage) -> Network:
    """The network of a ``stage``; a row or two run to find its blocks."""
    trace, thresholds = find(stage, run.lockstep), run.job.thresholds
    found = replayable(stage, run.lockstep, trace.barriers(thresholds.blocks[-1]), thresholds)
    return Network.of(trace, found.written)


class RowGradients:
    """The gradients of a stage's rows with respect to ``factors``, the merged changes by site, as
    leaves. Rows are merged rows with the texts of a ``copy`` of the rows. ``room`` bytes of main
    memory are for targets, so that a row that comes again needs no forward of its LoRA. All within
    :meth:`active`."""

    def __init__(
        self,
        run: Run,
        stage: Stage,
        network: Network,
        factors: Mapping[str, LowRank],
        copy: int = 1,
        room: int = 0,
    ) -> None:
        assert stage.final is not None
        self._job, self._lockstep, self._stage, self.network = (
            run.job,
            run.lockstep,
            stage,
            network,
        )
        self._final, self._copy, self._factors = stage.final, copy, factors
        self.leaves = [leaf for of in factors.values() for leaf in (of.up, of.down)]
        self._targets = Targets(room)
        self._weights = [1.0] * len(stage.rows)
        self._before = dict[Hint, float]()
        """s_b"""
        self._scale, self._lowered, self._mutable = 1.0, 0, False

    @contextmanager
    def active(self, losing: set[nn.Module] | None = None) -> Generator[None]:
        """Context in which the factors are merged, and a row was tried: it raises if blocks that
        run again give something else. ``losing`` gets the blocks that lose gradients."""
        lockstep, merged, row = self._lockstep, self._lockstep.merged, longest(self._stage)
        with self.network.differentiable(self._factors, self._stage.gradients, losing):
            lockstep.merged = {**merged, **self._factors}
            try:
                plain = self._outputs([row], self._copy, merged=True)
                again = self._outputs([row], self._copy, merged=True, then=lambda _: None)
                if not alike([again], [plain], self._job.thresholds.replay_error):
                    raise SiteError("the model gives something else when it can be differentiated")
                try:
                    self.add([row], first=False)
                except RuntimeError as error:
                    if "inplace" not in str(error):
                        raise
                    self._mutable = True
                    self.clear()
                    self.add([row], first=False)
                self.clear()
                yield
            finally:
                lockstep.merged = merged

    def weigh(self, generator: torch.Generator) -> None:
        """Find w_r, from a few rows of each concept."""
        owners, concepts = [row.concept for row in self._stage.rows], self._job.concepts
        keys = [row.key for row in self._stage.rows]
        few: dict[int, list[int]] = {}
        for row in torch.randperm(len(owners), generator=generator).tolist():
            few.setdefault(owners[row], []).append(row)
        effects, entries = dict[int, float](), 1
        for owner, rows in few.items():
            square, rows = 0.0, rows[: self._job.thresholds.batch]
            for some in chunks(rows, keys, _AT_ONCE):
                own, base = (self._outputs(some, 0, of_base=of_base) for of_base in (False, True))
                square += float((own - base).float().square().sum())
                entries = own[0].numel()
            effects[owner] = square / len(rows)
        known = [effect for effect in effects.values() if effect > 0]
        if not known:
            raise SiteError("no LoRA changes anything in its rows")
        typical = sum(known) / len(known)
        least = _LEAST_EFFECT * typical
        self._weights = [
            concepts[owner].weight / max(effects[owner] or typical, least) for owner in owners
        ]
        # 2 w (f_merged − f_LoRA) is about twice the root of 1 / (effect · entries).
        self._scale = 2.0 ** round(math.log2(_AT_OUTPUT * (typical * entries) ** 0.5 / 2))

    def peak(self, rows: int) -> int:
        """The memory that the gradients of so many rows take, all like the largest."""
        stage, row = self._stage, longest(self._stage)
        costliest = stage.costliest_loads
        self._stage = replace(stage, rows=[replace(row, loads=costliest) for row in stage.rows])
        self.add([row], first=False)  # some of its first run may stay
        with MemoryMeter() as meter:
            self.add([row] * rows, first=False)
        self._stage = stage
        self.clear()
        return meter.peak

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def settled(self) -> bool:
        """Give the gradients their true size; False if one is not finite."""
        grads = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        for grad in grads:
            grad /= self._scale
        return bool(torch.stack([grad.isfinite().all() for grad in grads]).all())

    def lower(self) -> bool:
        """Make gradients smaller, which may have been too large for half precision; False if that
        was done often enough."""
        self._scale, self._lowered = self._scale * _LOWER, self._lowered + 1
        return self._lowered <= _LOWERED

    def add(self, rows: Sequence[int], *, first: bool) -> None:
        """Add the gradients of these rows' loss. At ``first``, s_b is the largest error of a block
        so far."""
        final, wanted = self._targets.of(rows, self._own)
        actual = dict[Hint, Tensor]()
        weights = final.new_tensor([self._weights[row] for row in rows], dtype=torch.float32)

        def loss(outputs: Tensor) -> None:
            total: Any = _Error.apply(outputs, final, weights)
            pairs = {h: (of, wanted[h]) for h, of in actual.items() if h in wanted}
            for hint, pair in pairs.items():
                error: Any = _Error.apply(*pair, weights)
                if first:
                    before = float(error.detach()) / len(rows)
                    self._before[hint] = max(self._before.get(hint, 0.0), before)
                share = self._job.thresholds.hints / len(pairs)
                total = total + error * (share / max(self._before.get(hint, 0.0), 1e-30))
            (total * self._scale).backward(inputs=self.leaves)

        # Within the forward: the backward pass runs blocks, and their changes, again.
        self._outputs(rows, self._copy, merged=True, hints=actual, then=loss)

    def _own(self, rows: Sequence[int]) -> Outputs:
        """What the rows' own LoRAs do."""
        hints = dict[Hint, Tensor]()
        return self._outputs(rows, 0, hints=hints), hints

    def _outputs(
        self,
        rows: Sequence[int],
        copy: int,
        *,
        merged: bool = False,
        of_base: bool = False,
        hints: dict[Hint, Tensor] | None = None,
        then: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """The final outputs of ``rows`` with the texts of a ``copy``: of their own LoRAs, or if
        ``merged`` or ``of_base`` of that. Those of the blocks go into ``hints``. ``then`` gets the
        outputs with gradients."""
        lockstep, made, of_rows = self._lockstep, list[Tensor](), self._stage.at(rows)

        def run() -> None:
            made.append(self._final(of_rows, copy))
            if then is not None:
                then(made[0])

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            by_row = [leaf for leaf in tensors_in(output) if len(leaf) == len(rows)]
            assert hints is not None
            if by_row:  # others join their rows in one dimension, as text blocks of Krea 2 do
                parts = [leaf.flatten(1) for leaf in by_row]
                call = sum(block is module for block, _ in hints)
                hints[module, call] = torch.cat(parts, 1) if len(parts) > 1 else parts[0]

        if merged or of_base:
            change = as_merged if merged else phantoms
            of_rows = [replace(row, loads=change(row.loaded)) for row in of_rows]
        batch = MicroBatch(run, of_rows)
        with ExitStack() as stack:
            for block in self.network.blocks if hints is not None else ():
                stack.enter_context(block.register_forward_hook(keep))
            if then is not None:
                stack.enter_context(saved_tensors(mutable=self._mutable))
            lockstep.run(batch, grad=then is not None)
        return made[0].detach()


class _Error(torch.autograd.Function):
    """Σ_r w_r ‖found_r − target_r‖², in float32. What it takes in memory does not stay."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        target, weights = target.to(found.device), weights.to(found.device)
        ctx.save_for_backward(found, target, weights)
        by_row = (found.float() - target.float()).square().flatten(1).sum(1)
        return (by_row * weights).sum()

    @staticmethod
    def backward(ctx: Any, *wanted: Tensor) -> Any:
        found, target, weights = ctx.saved_tensors
        gap = found.float() - target.float()
        gap *= (2 * wanted[0] * weights).reshape(-1, *[1] * (gap.ndim - 1))
        return gap.to(found.dtype), None, None
