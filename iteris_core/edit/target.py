"""How small a LoRA's file is to be, and the ranks of its layers in a file of that size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import SettingsError
from ..solve.ranks import Components, by_worth, share_numbers

_HEADER = 400
"""Most bytes that a file's header needs per module."""


@dataclass(frozen=True)
class Target:
    """One of three: ``rank``, for a file as large as with that rank in every layer; ``megabytes``
    of the file; or ``energy``, the share to keep of what the LoRA adds to the outputs of all
    layers. Raises :class:`SettingsError` for a number out of range."""

    rank: int | None = None
    megabytes: float | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if [self.rank, self.megabytes, self.energy].count(None) != 2:
            raise SettingsError(
                "Give exactly one of rank, size and energy, such as rank 8, size 20 or energy 0.95."
            )
        if self.rank is not None and self.rank < 1:
            raise SettingsError(f"rank must be at least 1, not {self.rank}.")
        if self.megabytes is not None and not self.megabytes > 0:
            raise SettingsError(f"size must be above 0 MB, not {self.megabytes}.")
        if self.energy is not None and not 0 < self.energy < 1:
            raise SettingsError(f"energy must be between 0 and 1, not {self.energy}.")


def share_out(sites: Mapping[str, Components], target: Target, itemsize: int = 2) -> dict[str, int]:
    """Site → its rank, 0 if left out. Components with the most worth per stored number are taken
    first, until ``target`` is reached. ``itemsize`` is bytes per number in the file. Raises
    :class:`SettingsError` if no component fits the size."""
    if target.energy is not None:
        missing = target.energy * sum(components.total for components in sites.values())
        ranks = dict.fromkeys(sites, 0)
        for _, worth, site in by_worth(sites):
            if missing <= 0:
                break
            ranks[site] += 1
            missing -= worth
        return ranks
    if target.rank is not None:
        changes = [components.change for components in sites.values()]
        numbers = sum(min(target.rank, change.rank) * sum(change.shape) for change in changes)
    else:
        numbers = int((target.megabytes or 0) * 1e6 - _HEADER * len(sites)) // itemsize
    ranks = share_numbers(sites, numbers)
    if target.megabytes is not None and not any(ranks.values()):
        raise SettingsError(
            f"{target.megabytes:g} MB is too small for a single component of these layers; use a "
            "larger size."
        )
    return ranks


def worth_share(sites: Mapping[str, Components], ranks: Mapping[str, int]) -> float:
    """The share of the total worth that remains at these ``ranks``."""
    total = sum(components.total for components in sites.values())
    remains = sum(float(of.worths[: ranks[site]].sum()) for site, of in sites.items())
    return remains / total if total > 0 else 1.0
