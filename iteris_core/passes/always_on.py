"""LoRAs that are on in every forward of a merge: speed LoRAs, such as turbo and lightning.

A concept's target is then what its LoRA does together with them, on a model that has them on. They
act as a part of the base: hooks add their change to each site's output before anything else sees
it. So the merged change is that of the concepts alone, and a file that is to hold them too has
their exact change beside it, Δ = Δ_always + Δ_merged.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..activations.site import Site, site_of
from ..concepts import Concept
from ..hosts.protocol import Host
from ..lora import LowRank, SiteChanges, concatenate
from .changes import changes_of, check_sites


def always_on(concepts: Sequence[Concept], *kinds: str) -> list[Concept]:
    """Those that are on in every forward; with ``kinds`` those whose ``always_on`` is one of
    these."""
    return [one for one in concepts if one.always_on in (kinds or ("include", "outside"))]


def changes_always(concepts: Sequence[Concept]) -> dict[str, LowRank]:
    """Site → the exact sum of the concepts' changes, at their strengths."""
    return {site: some.stacked() for site, some in _changes(concepts).items()}


def _changes(concepts: Sequence[Concept]) -> Mapping[str, SiteChanges]:
    return changes_of(concepts) if concepts else {}


@contextmanager
def switched_on(host: Host, concepts: Sequence[Concept]) -> Generator[None]:
    """The base of ``host`` with the LoRAs of ``concepts`` on it; no weight is touched. Raises
    :class:`MismatchError` where they change sites that the base lacks."""
    changes = _changes(concepts)
    if changes:
        check_sites(host, changes)
    modules = host.sites() if changes else {}
    handles = [
        modules[site].register_forward_hook(_adding(site_of(site, modules[site]), some.stacked()))
        for site, some in changes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(site: Site, change: LowRank) -> Callable[..., None]:
    ready = {"change": change}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inputs: Tensor = args[0]
        now = ready["change"]
        if (now.up.dtype, now.up.device) != (inputs.dtype, inputs.device):
            now = ready["change"] = change.to(inputs.dtype, inputs.device)
        site.add(now, inputs, output)

    return hook


def beside(changes: Mapping[str, LowRank], always: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """``always`` and ``changes`` in one, site by site. Those that are always on come first: a later
    cut to a rank keeps the first components."""
    joined = dict(changes)
    for site, change in always.items():
        if site in changes:
            like = changes[site].up
            change = concatenate([change.to(like.dtype, like.device), changes[site]])
        joined[site] = change
    return joined
