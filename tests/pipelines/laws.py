"""A merge on a reduced pipeline, held against what the pipeline's own loader makes of the files."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from architecture_results import drift_in
from safetensors.torch import save_file
from small_merge import unmeasured
from torch import Tensor

from iteris_core import Concept, Lora, MergeResult, merge_loras, write_lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.lora_files.experts import joined_experts, split_experts

from .loras import applied, loaded, lora_tensors
from .reduced import PROMPTS, Reduced, draw

CALIBRATION = {"samples": 4, "timesteps": 2, "denoising_steps": 3, "seed": 3}


class Laws:
    """A trial of one reduced pipeline; files go into ``folder``. With two experts there is a file
    for each of them."""

    def __init__(self, reduced: Reduced, folder: Path) -> None:
        self.reduced, self._folder = reduced, folder
        self._pipeline = reduced.pipeline
        self._experts = getattr(self._pipeline, "transformer_2", None) is not None
        self._base = self._drawn()
        self.left_out = self.drift = ""
        self.kept: list[float] = []

    def alone(self) -> float:
        """How far the merge of one LoRA draws from that LoRA, as a share of its effect. ``kept`` is
        then what the merge says that it keeps of it."""
        files = self._files(1)
        result = self._merged([files], 32)
        merged = result.lora
        self.kept = [share for shares in result.report.kept.values() for share in shares]
        parts = (_left_out(self._read(files), merged), self.reduced.left_out)
        self.left_out = ", ".join(filter(None, parts))
        # Without what is left out.
        return self._furthest(merged, self._files(1, set(merged.sites)))

    def rows_and_file(self) -> tuple[float, float]:
        """How far a site of the merge of two goes with the number of rows without steps, which
        grow what rounding leaves, and how far the file of one with steps draws from it."""
        both = [self._files(seed) for seed in (1, 2)]
        with unmeasured():
            many, few = (self._merged(both, count, 0).lora.sites for count in (32, 5))
            result = self._merged(both, 32, 2)
        merged, notes = result.lora, result.report.notes
        self.drift, self.steps = drift_in(notes), notes["steps"]
        gaps = {site: many[site].dense() - change.dense() for site, change in few.items()}
        rows = max(float(gap.norm() / few[site].dense().norm()) for site, gap in gaps.items())
        parts = split_experts(merged, "transformer") if self._experts else (merged,)
        files = [
            write_lora(part, self._folder / f"m{index}.safetensors", layout="peft", dtype="float32")
            for index, part in enumerate(parts)
        ]
        return rows, self._furthest(merged, files)

    def unchanged(self) -> bool:
        """Whether the pipeline draws what it drew at first, bit by bit."""
        return all(torch.equal(*pair) for pair in zip(self._drawn(), self._base, strict=True))

    def _files(self, seed: int, sites: set[str] | None = None) -> list[Path]:
        """A random LoRA, of some sites alone if they are given."""
        files: list[Path] = []
        for expert in range(1 + self._experts):
            tensors = lora_tensors(self._pipeline, seed + 10 * expert)
            if sites is not None:
                names = {key: _site(key, expert) for key in tensors}
                tensors = {key: t for key, t in tensors.items() if names[key] in sites}
            files.append(self._folder / f"{seed}-{expert}.safetensors")
            save_file(tensors, files[-1])
        return files

    def _read(self, files: Sequence[Path]) -> Lora:
        host = DiffusersHost(self._pipeline, **self.reduced.call)
        loras = [host.read_lora(file) for file in files]
        return joined_experts(*loras, "transformer") if self._experts else loras[0]

    def _merged(
        self, loras: Sequence[Sequence[Path]], rows: int, steps: int | None = None
    ) -> MergeResult:
        prompts = list(self.reduced.prompts[-5:-1])
        return merge_loras(
            DiffusersHost(self._pipeline, **self.reduced.call),
            [Concept(self._read(files), prompts=prompts) for files in loras],
            settings={"micro_batch": rows, "steps": steps, **self.reduced.settings},
            calibration=CALIBRATION,
            unmergeable="skip",
        )

    def _drawn(self) -> list[Tensor]:
        prompts = [p for p in (PROMPTS[1], "", PROMPTS[4]) if p in self.reduced.prompts]
        return [draw(self.reduced, prompt) for prompt in prompts]

    def _furthest(self, lora: Lora, files: Sequence[Path]) -> float:
        """Of all prompts, between the LoRA's changes and the loaded files."""
        with ExitStack() as stack:
            for expert, file in enumerate(files):
                stack.enter_context(loaded(self._pipeline, file, second=expert == 1))
            theirs = self._drawn()
        with applied(self._pipeline, lora):
            ours = self._drawn()
        drawn = zip(ours, theirs, self._base, strict=True)
        return max(float((a - b).norm() / (b - base).norm()) for a, b, base in drawn)


def _site(key: str, expert: int) -> str:
    name = key.partition(".lora_")[0]
    return name.replace("transformer.", "transformer_2.", 1) if expert else name


def _left_out(lora: Lora, merged: Lora) -> str:
    """The layers of ``lora`` that were not merged, with a star for numbers."""
    sites = lora.sites.keys() - merged.sites.keys()
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", site.rpartition(".")[0]) for site in sites}
    return ", ".join(name.partition(".")[2] for name in sorted(names))
