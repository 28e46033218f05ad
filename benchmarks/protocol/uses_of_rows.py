"""Errors of a merge on strict rows, whose words no fitted row had, in each use of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch

from iteris_core import Concept, LowRank
from iteris_core.activations.rows import phantom_of
from iteris_core.passes.changes import beside

from .new_rows import NewRows, relative
from .world import World

PHANTOM = "a phantom at 0.6"
USES: Mapping[str, tuple[float, float]] = {
    "plain": (1.0, 0.0),
    "0.8": (0.8, 0.0),
    "1.2": (1.2, 0.0),
    "another at 0.6": (1.0, 0.6),
    "another at 1": (1.0, 1.0),
}
"""Use → the strength of what is measured, and of another LoRA beside it."""
_SEED = 4711

Changes = Mapping[str, LowRank]


class Errors:
    """Errors of merges of ``concepts`` on prompts of ``templates``, where ``other`` may be beside
    them: ‖f_merged − f_LoRA‖ / ‖f_base − f_LoRA‖ of the denoiser's outputs, each LoRA loaded as
    the merge is. With ``phantom`` also beside a random LoRA with the norms of the first one's."""

    def __init__(
        self,
        world: World,
        concepts: Sequence[Concept],
        other: Changes,
        templates: Sequence[str],
        *,
        phantom: bool = False,
    ) -> None:
        self._rows = NewRows(world.host, concepts, _SEED, samples=8, templates=list(templates))
        own = [concept.lora.sites for concept in concepts if concept.lora is not None]
        self._beside = {
            use: (strength, {site: change.scaled(more) for site, change in other.items()})
            for use, (strength, more) in USES.items()
        }
        if phantom:
            self._beside[PHANTOM] = 1.0, phantom_of(own[0], 0.6, _SEED)
        self._known = {
            use: [(rows, self._outputs({}, rows, use), self._outputs(sites, rows, use))
                  for sites, rows in zip(own, self._rows.of, strict=True)]
            for use in self._beside
        }  # fmt: skip

    def errors(self, merged: Changes) -> dict[str, float]:
        """By use, the mean over the LoRAs."""
        return {use: fmean(found) for use, found in self._found(merged).items()}

    def kept(self, merged: Changes) -> dict[str, float]:
        """By use 1 − error², the mean over the LoRAs: 1 for each LoRA alone, 0 for the base."""
        found = self._found(merged)
        return {use: fmean(1 - one**2 for one in of) for use, of in found.items()}

    def _found(self, merged: Changes) -> dict[str, list[float]]:
        return {
            use: [
                relative(self._outputs(merged, rows, use), wanted, base)
                for rows, base, wanted in known
            ]
            for use, known in self._known.items()
        }

    def _outputs(self, changes: Changes, rows: Sequence[int], use: str) -> torch.Tensor:
        strength, other = self._beside[use]
        scaled = {site: change.scaled(strength) for site, change in changes.items()}
        return self._rows.outputs(beside(scaled, other), rows)
