"""What the inputs of a merging node ask for, as the library takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..iteris_core.concepts import Calibration
from ..iteris_core.lora_files.purposes import is_fast
from ..iteris_core.merge import Unmergeable
from ..iteris_core.methods import find_method
from ..iteris_core.methods.iteris_settings import IterisSettings
from ..iteris_core.presets import PRESETS, PresetName, preset_settings
from ..iteris_core.settings import declared_settings
from .comfy_conds import References
from .merge_inputs import changed

CALIBRATION = (
    "timesteps", "latents", "latent_size", "frames", "denoising_steps", "guidance", "empty_share",
    "contexts", "generic", "composites",
)  # fmt: skip
ITERIS = (
    "rank", "repair", "repair_inputs", "block_steps", "block_pairs", "schedule", "iterations",
    "tolerance", "objective", "weighting", "ridge", "pull", "shrink", "saliency", "row_tokens",
    "precision",
)  # fmt: skip
"""Without those that ComfyUI cannot follow (gradients through a whole model), without the number of
rows in a forward, which the memory decides, and without the rate of the polish."""
RIVALS: Mapping[str, str] = {
    "density": "Other methods: the share of entries that is kept of each LoRA.",
    "scale": "Other methods: what the merged change is multiplied by.",
}
_DEFAULT_METHOD = "iteris"


@dataclass(frozen=True)
class Asked:
    """``values`` are those of IterIS Settings, by name; ``files`` the names of those behind MODEL,
    which may say that it is run without guidance; ``samples`` 0 is the preset's number."""

    preset: PresetName = "default"
    samples: int = 0
    seed: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[str] = ()
    references: References = field(default_factory=References)

    @property
    def calibration(self) -> Calibration:
        """What the inputs say over what the preset says."""
        values = {name: self.values[name] for name in CALIBRATION if name in self.values}
        given = changed(Calibration, {"seed": self.seed, **values})
        given |= {"samples": self.samples} if self.samples else {}
        return Calibration.from_mapping({**PRESETS[self.preset].calibration, **given})

    def settings(self, method: str) -> dict[str, Any]:
        """Of other methods than ours the rank and :data:`RIVALS`, as far as they have them."""
        if method != _DEFAULT_METHOD:
            known = declared_settings(find_method(method).settings)
            given = {n: self.values.get(n) for n in ("rank", *RIVALS)}
            return {n: v for n, v in given.items() if v and n in known}
        values = {name: self.values[name] for name in ITERIS if name in self.values}
        return {**preset_settings(self.preset, method), **changed(IterisSettings, values)}

    @property
    def memory_budget(self) -> int | Literal["free"]:
        memory: float = self.values.get("memory", 0.0)
        return round(memory * 2**30) if memory else "free"

    @property
    def unmergeable(self) -> Unmergeable:
        return self.values.get("cannot_merge", "refuse")

    @property
    def distilled(self) -> bool | None:
        known = {"yes": False, "no": True}
        return True if self._fast else known.get(self.values.get("empty_prompts", "auto"))

    @property
    def options(self) -> dict[str, Any]:
        """How the base is run, for :func:`.merging.merge_on`."""
        return {
            "references": self.references,
            "distilled": self.distilled,
            "unmergeable": self.unmergeable,
            "memory_budget": self.memory_budget,
        }

    @property
    def note(self) -> str:
        """What a report has to say of the inputs."""
        if not self._fast:
            return ""
        return (
            f"\n  Without empty prompts: by its name {self._fast} draws in few steps, without "
            "guidance. If you use guidance, set empty_prompts to yes."
        )

    @property
    def _fast(self) -> str:
        return is_fast(self.files) if self.values.get("empty_prompts", "auto") == "auto" else ""
