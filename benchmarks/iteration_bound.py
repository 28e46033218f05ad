"""The most iterations that Algorithm 1 can take to its fixed point (the paper's appendix A.3).

A site's solution depends on its inputs alone, and these on the sites before it. So the sites that
no other reaches are right after the first solve, and each further iteration makes those right whose
predecessors are. With the longest chain of sites that feed each other counting s sites, s solves
are enough: the first, which the paper counts as iteration 0, and s - 1 iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NUDGE = 0.5
"""By what share of itself an output is moved to see whom it reaches."""


def depths(sites: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, int]:
    """Site → how many sites the longest chain up to it has, itself among them.

    ``run`` is a forward that gives the same every time and calls each site once. Which sites one
    feeds is found by moving its output, not from the model's code.
    """
    with torch.no_grad(), _inputs(sites) as seen:
        run()
        order, plain = list(seen), dict(seen)
        feeds: dict[str, list[str]] = {site: [] for site in order}
        for site in order:
            seen.clear()
            handle = sites[site].register_forward_hook(_moved)
            try:
                run()
            finally:
                handle.remove()
            feeds[site] = [s for s in order if s != site and not torch.equal(seen[s], plain[s])]
    found = dict.fromkeys(order, 1)
    for site in order:  # in which they are called, so that predecessors come first
        for fed in feeds[site]:
            found[fed] = max(found[fed], found[site] + 1)
    return found


def iterations_bound(found: Mapping[str, int]) -> int:
    """After the first solve."""
    return max(found.values()) - 1


@contextmanager
def _inputs(sites: Mapping[str, nn.Module]) -> Generator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def hook(site: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if site in seen:
                raise ValueError(f"Site {site} is called twice in a forward.")
            seen[site] = args[0].detach().clone()

        return keep

    handles = [module.register_forward_pre_hook(hook(site)) for site, module in sites.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _moved(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(output.shape, generator=generator).to(output)
    return output + NUDGE * output.std() * noise
