"""Sites whose inputs have the batch's rows in another dimension than the first.

A layer may get the tokens of all rows as one row, or every frame of a video as a separate row. Such
a site is merged like any other if each row's tokens stay together, in the order of the rows.
Running two rows together and separately checks this.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts.protocol import Stage
from ..hosts.recorded import differ

_PAIRS = 4
_NUMBERS = 8  # numbers that represent a token
_ROUNDING = 1e-3


def joined_rows(stage: Stage, modules: Mapping[str, nn.Module]) -> set[str]:
    """The ``modules``, sites of ``stage``, whose inputs are the rows' tokens one row after another.

    Two rows that may share a forward, run together, give such a site the first row's tokens
    followed by the second's. If all rows give the same tokens, they must occur twice and not repeat
    within a row; otherwise tokens in another order would look the same.
    """
    undecided = {s: m for s, m in modules.items() if not isinstance(m, nn.Conv2d)}
    joined: set[str] = set()
    alike: set[str] = set()
    for one, other in _pairs(stage.batch_keys or [None] * len(stage.concept_ids)):
        pairs = [one, one], [other, other], [one, other]
        alone, beside, both = (_halves(stage, rows, undecided) for rows in pairs)
        for site in list(undecided):
            first, second, mixed = alone.get(site), beside.get(site), both.get(site)
            if first is None or second is None or mixed is None or not _same(*first):
                del undecided[site]
            elif not _same(first[0], second[0]):
                del undecided[site]
                if _same(first[0], mixed[0]) and _same(second[0], mixed[1]):
                    joined.add(site)
            elif not _repeats(first[0]):
                alike.add(site)
        if not undecided:
            break
    return joined | (alike & undecided.keys())


def _pairs(kinds: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Pairs of rows of one kind, as far apart as possible."""
    rows: dict[Hashable, list[int]] = {}
    for row, kind in enumerate(kinds):
        rows.setdefault(kind, []).append(row)
    pairs = [
        (at, some[at], some[-1 - at]) for some in rows.values() for at in range(len(some) // 2)
    ]
    return [(one, other) for _, one, other in sorted(pairs)[:_PAIRS]]


def _halves(
    stage: Stage, rows: Sequence[int], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The tokens that each of two rows gives the ``modules``, (tokens, :data:`_NUMBERS`) each, for
    modules with equally many from both. A random projection represents a token, because a large
    model's inputs would not fit in memory at once."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs: Tensor = args[0]
            width = inputs.shape[-1]
            if inputs.ndim > 1 and inputs.numel() // width % 2 == 0:
                generator = torch.Generator().manual_seed(width)
                factors = torch.randn(width, _NUMBERS, generator=generator)
                tokens = inputs.detach().float() @ factors.to(inputs.device)
                first, second = tokens.cpu().reshape(2, -1, _NUMBERS)
                found[site] = first, second

        return hook

    with ExitStack() as stack:
        for site, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(keep(site)))
        stage.run(rows, 1)
    return found


def _repeats(tokens: Tensor) -> bool:
    """True if (tokens, width) consist of one part, repeated."""
    count = len(tokens)
    parts = (tokens.reshape(n, -1) for n in range(2, count + 1) if count % n == 0)
    return any(_same(some[1:], some[:-1]) for some in parts)


def _same(one: Tensor, other: Tensor) -> bool:
    return not differ(one, other, _ROUNDING)
