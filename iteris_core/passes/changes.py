"""The concepts' changes by site, and a check that the base has these sites.

Speed LoRAs, such as turbo and lightning, are on in every forward of a merge, as part of the base:
hooks add their change to each site's output before anything else sees it. The merged change
therefore covers only the concepts; a file that includes speed LoRAs adds their exact change, Δ =
Δ_always + Δ_merged.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager

from ..activations.lockstep import Lockstep
from ..activations.micro_batch import MicroBatch
from ..calibration_prompts import Composite
from ..concepts import Concept
from ..errors import MismatchError
from ..hosts.protocol import Host
from ..linalg import truncate_factors
from ..lora import LowRank, SiteChanges, concatenate


def changes_of(concepts: Sequence[Concept]) -> dict[str, SiteChanges]:
    """Every concept's change, at its strength, at every site that any concept changes; composites
    come last, as sums of others."""
    own = [concept for concept in concepts if not isinstance(concept, Composite)]
    place = {id(concept): number for number, concept in enumerate(own)}
    sums = tuple(
        tuple(place[id(part)] for part in concept.parts)
        for concept in concepts
        if isinstance(concept, Composite)
    )
    loras = [concept.lora for concept in concepts if concept.lora is not None]
    if not loras:
        raise MismatchError("There is no LoRA to merge: none is selected, or all have strength 0.")
    kinds = sorted({lora.base.architecture.title for lora in loras if lora.base is not None})
    if len(kinds) > 1:
        raise MismatchError(f"The LoRAs were made for different base models: {', '.join(kinds)}.")

    def change_of(concept: Concept, site: str) -> LowRank | None:
        """None if there is none at the concept's strength."""
        strength, of_text = concept.strength, concept.text_strength
        if of_text is not None and site.startswith("text_encoder"):
            strength = of_text
        change = None if concept.lora is None else concept.lora.sites.get(site)
        if change is None or strength == 0 or not (change.up.any() and change.down.any()):
            return None
        return change.scaled(strength)

    sites = {site: None for lora in loras for site in lora.sites}
    changes: dict[str, SiteChanges] = {}
    for site in sites:
        at_site = SiteChanges(tuple(change_of(concept, site) for concept in own), sums)
        if not at_site.own:
            continue
        shapes = {change.shape for change in at_site.own.values()}
        if len(shapes) > 1:
            raise MismatchError(
                f"Site {site} has changes of different shapes {sorted(shapes)}; the LoRAs were "
                "made for different base models."
            )
        changes[site] = at_site
    if not changes:
        raise MismatchError(
            "The LoRAs change no site; are the files empty, or are the strengths 0 where they "
            "have sites?"
        )
    return changes


def check_sites(host: Host, changes: Collection[str]) -> None:
    known = host.sites()
    missing = [site for site in changes if site not in known]
    if missing:
        raise MismatchError(
            f"{len(missing)} of {len(changes)} sites are not in the base model, such as "
            f"{', '.join(missing[:3])}; the LoRAs were made for another base model."
        )


def means_of(concepts: Sequence[Concept], changes: Mapping[str, SiteChanges]) -> dict[str, LowRank]:
    """The mean of the LoRAs' ``changes``, without any fit; its components are sorted by energy, so
    a later cut to a rank keeps the best ones."""
    weights = [0.0 if concept.lora is None else concept.weight for concept in concepts]
    means = {s: some.mean(weights, some.like.up.dtype) for s, some in changes.items()}
    return {site: truncate_factors(mean, mean.rank)[0] for site, mean in means.items()}


def changes_always(concepts: Sequence[Concept]) -> dict[str, LowRank]:
    """Site → the exact sum of the concepts' changes, at their strengths."""
    changes = changes_of(concepts) if concepts else {}
    return {site: some.stacked() for site, some in changes.items()}


@contextmanager
def added(host: Host, changes: Mapping[str, LowRank]) -> Generator[None]:
    """Context in which ``changes``, by site, act as part of the base of ``host``; no weight is
    touched."""
    check_sites(host, changes)
    on = {site: SiteChanges((change,)) for site, change in changes.items()}
    every = MicroBatch(lambda: None, always=[0])
    with Lockstep(host.sites(), on) as lockstep, lockstep.active(every):
        yield


def beside(changes: Mapping[str, LowRank], always: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """``always`` and ``changes`` combined site by site. Those that are always on come first,
    because a later cut to a rank keeps the first components."""
    joined = dict(changes)
    for site, change in always.items():
        if site in changes:
            like = changes[site].up
            change = concatenate([change.to(like.dtype, like.device), changes[site]])
        joined[site] = change
    return joined
