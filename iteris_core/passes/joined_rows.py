"""Sites whose inputs have the rows of a batch elsewhere than in their first dimension.

A layer may get the tokens of all rows as one row, or every frame of a video as a row of its own.
Such a site is merged like any other where the tokens of one row still stand together, in the order
of the rows. That is found by running two rows together and apart.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts.protocol import Stage

_PAIRS = 4
_ROUNDING = 1e-3


def joined_rows(stage: Stage, modules: Mapping[str, nn.Module]) -> set[str]:
    """Those of ``modules``, sites of ``stage``, whose inputs are the tokens of row after row.

    Two rows that may share a forward, run together, give such a site the tokens of the one and then
    those of the other. Where all rows give it the same tokens, they have to come twice, and may not
    repeat themselves within a row: else tokens in another order would look alike.
    """
    undecided = {s: m for s, m in modules.items() if not isinstance(m, nn.Conv2d)}
    joined: set[str] = set()
    alike: set[str] = set()
    for one, other in _pairs(stage.batch_keys or [None] * len(stage.concept_ids)):
        if not undecided:
            break
        with _inputs_of(undecided) as inputs:
            alone, beside, both = (
                {site: _halves(some) for site, some in inputs(partial(stage.run, rows, 1)).items()}
                for rows in ([one, one], [other, other], [one, other])
            )
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
    return joined | (alike & undecided.keys())


def _repeats(tokens: Tensor) -> bool:
    """True if (tokens, width) are one part, several times."""
    count = len(tokens)
    parts = (tokens.reshape(n, -1) for n in range(2, count + 1) if count % n == 0)
    return any(_same(some[1:], some[:-1]) for some in parts)


def _pairs(kinds: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Rows of one kind, as far apart as they are."""
    rows: dict[Hashable, list[int]] = {}
    for row, kind in enumerate(kinds):
        rows.setdefault(kind, []).append(row)
    pairs = [
        (at, some[at], some[-1 - at]) for some in rows.values() for at in range(len(some) // 2)
    ]
    return [(one, other) for _, one, other in sorted(pairs)[:_PAIRS]]


@contextmanager
def _inputs_of(
    modules: Mapping[str, nn.Module],
) -> Generator[Callable[[Callable[[], None]], dict[str, Tensor]]]:
    """A function that runs what it is given, and returns the inputs of ``modules`` there."""
    found: dict[str, Tensor] = {}

    def keep(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[site] = args[0].detach().clone()

        return hook

    def inputs(run: Callable[[], None]) -> dict[str, Tensor]:
        found.clear()
        run()
        return found

    with ExitStack() as stack:
        for site, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(keep(site)))
        yield inputs


def _halves(inputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """The tokens of two rows, if there are as many of each."""
    if inputs.ndim < 2 or inputs.numel() // inputs.shape[-1] % 2:
        return None
    first, second = inputs.double().reshape(2, -1, inputs.shape[-1])
    return first, second


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool(torch.linalg.norm(one - other) <= _ROUNDING * torch.linalg.norm(one))
