"""What a merge begins with: the concepts' changes by site, and whether the base has those sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..composites import Composite
from ..concepts import Calibration, Concept
from ..errors import MismatchError
from ..hosts.protocol import Host, Tick
from ..lora import LowRank, SiteChanges, concatenate
from . import preflight
from .eta import Seen


def changes_of(concepts: Sequence[Concept]) -> dict[str, SiteChanges]:
    """Every concept's change of every site that any of them changes, at its strength; composites
    come last."""
    sums = sum(isinstance(concept, Composite) for concept in concepts)
    loras = [concept.lora for concept in concepts if concept.lora is not None]
    if not loras:
        raise MismatchError("There is no LoRA to merge: every concept is empty or at strength 0.")
    kinds = sorted({lora.base.architecture.title for lora in loras if lora.base is not None})
    if len(kinds) > 1:
        raise MismatchError(f"The LoRAs were made for different base models: {', '.join(kinds)}.")
    sites = {site: None for lora in loras for site in lora.sites}
    changes: dict[str, SiteChanges] = {}
    for site in sites:
        at_site = SiteChanges(tuple(_change(concept, site) for concept in concepts), sums)
        if not at_site.present:
            continue
        shapes = {change.shape for change in at_site.present.values()}
        if len(shapes) > 1:
            raise MismatchError(
                f"Site {site} has changes of different shapes {sorted(shapes)}; the LoRAs were "
                "made for different base models."
            )
        changes[site] = at_site
    if not changes:
        raise MismatchError(
            "The LoRAs change no site at all; are the files empty, or the strengths where they "
            "have sites 0?"
        )
    return changes


def _change(concept: Concept, site: str) -> LowRank | None:
    """What the concept's LoRA changes at ``site``, at its strength, or the LoRAs of its parts
    together; None if that is nothing."""
    if isinstance(concept, Composite):
        found = [change for part in concept.parts if (change := _change(part, site)) is not None]
        return concatenate(found) if found else None
    strength = concept.strength_at(site)
    if concept.lora is None or site not in concept.lora.sites or strength == 0:
        return None
    return concept.lora.sites[site].scaled(strength)


def check_sites(host: Host, changes: Mapping[str, SiteChanges]) -> None:
    known = host.sites()
    missing = [site for site in changes if site not in known]
    if missing:
        raise MismatchError(
            f"{len(missing)} of {len(changes)} sites are not in the base model, such as "
            f"{', '.join(missing[:3])}; the LoRAs were made for another base model."
        )


def unmergeable_sites(
    host: Host,
    concepts: Sequence[Concept],
    changes: Mapping[str, SiteChanges],
    calibration: Calibration,
    tick: Tick,
    *,
    sweep: bool,
) -> tuple[dict[str, str], list[Seen]]:
    """Site → why it cannot be merged, and what was seen of every stage. Models of text are not
    looked at: their rows may be there once only, and their layers are all reached."""
    if not host.pictures:
        return {}, []
    return preflight.unmergeable(host, concepts, set(changes), calibration, tick, sweep=sweep)
