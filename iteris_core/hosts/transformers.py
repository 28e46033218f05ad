"""Any model of transformers as host, with peft adapters: encoders, decoders, both, with vision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Calibration, Concept
from ..errors import IterisError, SettingsError
from ..lockstep import Lockstep, MicroBatch
from ..lora import Lora
from ..lora_files import ReadOptions
from . import Stage, Tick
from .peft_folder import read_adapter
from .transformers_streams import transformer_streams

_CROSS = ("EncDecAttention", "encoder_attn", "crossattention")


@dataclass(frozen=True)
class ModelSamples:
    """One row a sample, sorted by concept: keyword arguments with a batch dimension of 1."""

    owners: Sequence[int]
    rows: Sequence[Mapping[str, Tensor]]


class TransformersHost:
    """Merges adapters of a ``PreTrainedModel`` on batches that the user gives (``Concept.inputs``).

    Each batch is a mapping of keyword arguments of the model's forward, tensors with rows first.
    ``generate``: keyword arguments of ``model.generate``; with it each LoRA first continues its own
    samples, and features are collected on every token that the model read meanwhile, as the paper
    does; without it they are collected on the batches as they are (teacher-forced). Padding, as the
    attention masks or labels of -100 mark it, is left out of the moments.
    """

    def __init__(self, model: Any, *, generate: Mapping[str, Any] | None = None) -> None:
        from transformers.pytorch_utils import Conv1D

        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise IterisError(f"{type(model).__name__} is no model of transformers.")
        self.model: Any = model
        self._generate = dict(generate) if generate is not None else None
        self._sites = {
            f"model.{name}": module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d | Conv1D)
        }

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _encodes_and_decodes(self) -> bool:
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    def sites(self) -> Mapping[str, nn.Module]:
        return self._sites

    def read_lora(self, path: str | Path, options: ReadOptions | None = None) -> Lora:
        """A folder of peft; it is read in full or not at all, whatever ``options`` say."""
        return read_adapter(Path(path), self._sites)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        raise IterisError("This method works from prompts, which a transformers host has not.")

    def samples(
        self,
        concepts: Sequence[Concept],
        sites: Set[str],
        calibration: Calibration,
        lockstep: Lockstep,
        generator: torch.Generator,
        tick: Tick,
    ) -> ModelSamples:
        owners: list[int] = []
        rows: list[Mapping[str, Tensor]] = []
        for index, concept in enumerate(concepts):
            mine = _split(concept, calibration.samples, self._encodes_and_decodes)
            owners += [index] * len(mine)
            rows += mine
        if self._generate is not None:
            rows = self._continued(rows, owners, lockstep, tick)
        return ModelSamples(owners, rows)

    def streams(self, sites: Set[str]) -> Mapping[str, nn.Module]:
        return transformer_streams(self._sites, sites, self.model)

    def stages(self, samples: ModelSamples, sites: Set[str]) -> Iterator[Stage]:
        def run(rows: Sequence[int], copies: int) -> None:
            self.model(**self._collate([samples.rows[row] for row in rows], copies))

        def mask(site: str, rows: Sequence[int]) -> Tensor | None:
            return self._mask(site, self._collate([samples.rows[row] for row in rows], 1))

        yield Stage("model", sorted(sites), samples.owners, run, mask)

    def forward(self, samples: ModelSamples, rows: Sequence[int]) -> Tensor:
        found = self.model(**self._collate([samples.rows[row] for row in rows], 1))
        for name in ("logits", "last_hidden_state"):
            if getattr(found, name, None) is not None:
                return getattr(found, name)
        raise IterisError(f"{type(self.model).__name__} gives no logits and no hidden state.")

    def _mask(self, site: str, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Which tokens count: a decoder's own, but for what it reads from the encoder."""
        name = "attention_mask"
        if self._encodes_and_decodes and ".decoder." in site:
            reads_encoder = any(mark in site for mark in _CROSS)
            leaf = site.rpartition(".")[2]
            if not (reads_encoder and leaf in ("k", "v", "k_proj", "v_proj", "key", "value")):
                name = "decoder_attention_mask"
        elif "vision" in site or "visual" in site:
            return None
        elif any(mark in site for mark in _CROSS) and site.endswith(("key", "value")):
            return None  # keys and values of pictures
        mask = batch.get(name)
        return None if mask is None else mask.bool()

    def _collate(self, rows: Sequence[Mapping[str, Tensor]], copies: int) -> dict[str, Tensor]:
        """Rows padded on the right to one length, ``copies`` times."""
        batch: dict[str, Tensor] = {}
        for name in rows[0]:
            parts = [row[name] for row in rows]
            if parts[0].ndim == 2:
                longest = max(part.shape[1] for part in parts)
                value = self._padding(name)
                parts = [
                    nn.functional.pad(part, (0, longest - part.shape[1]), value=value)
                    for part in parts
                ]
            batch[name] = torch.cat(parts * copies).to(self.device)
            if batch[name].is_floating_point():
                batch[name] = batch[name].to(self.model.dtype)
        return batch

    def _padding(self, name: str) -> float:
        if name == "labels":
            return -100
        if name.endswith("input_ids"):
            return getattr(self.model.config, "pad_token_id", None) or 0
        return 0

    def _continued(
        self,
        rows: Sequence[Mapping[str, Tensor]],
        owners: Sequence[int],
        lockstep: Lockstep,
        tick: Tick,
    ) -> list[Mapping[str, Tensor]]:
        """Every row with what its own LoRA generates from it; one row a call, so no padding."""
        continued: list[Mapping[str, Tensor]] = []
        for done, (row, owner) in enumerate(zip(rows, owners, strict=True), 1):
            # Models write into what they are given (BLIP its start token).
            batch = {name: tensor.clone().to(self.device) for name, tensor in row.items()}
            ids = self._generated(batch, owner, lockstep)[:, :-1]  # the last one is never read
            if self._encodes_and_decodes:
                mine = {**row, "decoder_input_ids": ids}
                mine["decoder_attention_mask"] = torch.ones_like(ids)
                mine.pop("labels", None)
            else:
                mine = {**row, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            continued.append(mine)
            tick("generating", done, len(rows))
        return continued

    def _generated(self, batch: dict[str, Tensor], owner: int, lockstep: Lockstep) -> Tensor:
        found: list[Tensor] = []
        options = {"do_sample": False, "num_beams": 1, **(self._generate or {})}

        def run() -> None:
            found.append(self.model.generate(**batch, **options))

        lockstep.run(MicroBatch(run, [owner], 1))
        if found[0].shape[1] < 2:
            raise IterisError("The model generated nothing; look at the arguments of generate.")
        return found[0].cpu()


def _split(concept: Concept, limit: int, decodes: bool) -> list[Mapping[str, Tensor]]:
    """The concept's batches as rows of one sample, ``limit`` of them at the most."""
    inputs: Any = concept.inputs
    if inputs is None:
        raise IterisError(
            f"Concept {concept.name!r} has no inputs; a transformers host needs batches of keyword "
            "arguments (Concept(inputs=…))."
        )
    batches: Any = inputs() if callable(inputs) else inputs
    rows: list[Mapping[str, Tensor]] = []
    for batch in batches:
        strange = [name for name, value in batch.items() if not isinstance(value, Tensor)]
        if strange:
            raise SettingsError(
                f"Concept {concept.name!r}: {', '.join(strange)} of a batch are not tensors; make "
                'batches with return_tensors="pt".'
            )
        tensors = _with_masks(batch, decodes)
        sizes = {len(value) for value in tensors.values()}
        if len(sizes) != 1:
            raise SettingsError(
                f"Concept {concept.name!r}: a batch has tensors of {sorted(sizes)} rows; "
                "all must have the same number."
            )
        rows += [
            {name: value[i : i + 1].cpu() for name, value in tensors.items()}
            for i in range(sizes.pop())
        ]
        if len(rows) >= limit:
            break
    if not rows:
        raise IterisError(f"Concept {concept.name!r} has no samples: its inputs are empty.")
    return rows[:limit]


def _with_masks(batch: Mapping[str, Tensor], decodes: bool) -> dict[str, Tensor]:
    """The batch with a mask for every kind of tokens, so that rows can be padded to one length."""
    masked = dict(batch)
    if "input_ids" in masked:
        masked.setdefault("attention_mask", torch.ones_like(masked["input_ids"]))
    if "decoder_input_ids" in masked:
        ones = torch.ones_like(masked["decoder_input_ids"])
        masked.setdefault("decoder_attention_mask", ones)
    elif decodes and "labels" in masked and masked["labels"].ndim == 2:
        # The model reads the labels shifted by one: a token counts where it has one to predict.
        masked.setdefault("decoder_attention_mask", (masked["labels"] != -100).long())
    return masked
