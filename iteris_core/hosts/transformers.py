"""Any transformers model as host, with peft adapters: encoders, decoders, both, with vision.
Batches are split into rows of one sample."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.lockstep import Lockstep
from ..activations.memory import free_memory, usable
from ..activations.micro_batch import MicroBatch
from ..activations.rows import Row
from ..architectures.record import TEXT_WIRINGS
from ..architectures.sites import residual_streams, weight_shape
from ..concepts import Concept
from ..errors import BaseError, ConceptError, SettingsError
from ..lora import Lora
from ..lora_files import ReadOptions
from ..lora_files.peft_folder import read_adapter
from .protocol import Host, SampleRequest, Stage, check_model, check_ready

Sample = Mapping[str, Tensor]
"""Keyword arguments of the model's forward, with a batch dimension of 1"""

_READ = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "attention_mask")
_CROSS = ("EncDecAttention", "encoder_attn", "crossattention")


class TransformersHost(Host):
    """Merges adapters of a ``PreTrainedModel`` on batches that the user supplies
    (``Concept.inputs``).

    Each batch is a mapping of keyword arguments for the model's forward, tensors with rows first.
    ``generate`` holds keyword arguments for ``model.generate``. With it, each LoRA first continues
    its own samples, and features are collected on every token that the model reads, as in the
    paper. Without it, they are collected on the batches as they are (teacher-forced). Padding on
    either side, marked by attention masks or labels of -100, is left out of the moments. Raises
    :class:`IterisError` for any other model, or if adapters are loaded.
    """

    pictures = False

    def __init__(self, model: Any, *, generate: Mapping[str, Any] | None = None) -> None:
        from transformers.pytorch_utils import Conv1D

        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise BaseError(f"{type(model).__name__} is not a transformers model.")
        check_model(model)
        self.model: Any = model
        self._generate = dict(generate) if generate is not None else None
        self._decodes = bool(getattr(self.model.config, "is_encoder_decoder", False))
        self._sites = {
            f"model.{name}": module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d | Conv1D)
        }

    @property
    def device(self) -> torch.device:
        """The device for inputs; accelerate's hooks know it if the weights are elsewhere."""
        hooks = (getattr(module, "_hf_hook", None) for module in self.model.modules())
        placed = (getattr(hook, "execution_device", None) for hook in hooks)
        known = next((device for device in placed if device is not None), None)
        return next(self.model.parameters()).device if known is None else torch.device(known)

    def sites(self) -> Mapping[str, nn.Module]:
        return self._sites

    def read_lora(self, path: str | Path, options: ReadOptions | None = None) -> Lora:
        """Read the peft folder ``path``; of ``options`` only ``layers`` applies."""
        shapes = {site: weight_shape(module) for site, module in self._sites.items()}
        return read_adapter(Path(path), shapes, options.layers if options is not None else "")

    def samples(self, request: SampleRequest) -> list[tuple[int, Sample]]:
        """Every sample and its concept, sorted by concept."""
        limit = request.calibration.samples
        samples = [
            (owner, sample)
            for owner, concept in enumerate(request.concepts)
            for sample in samples_of(concept, limit, decodes=self._decodes)
        ]
        check_ready(self.model)
        if self._generate is not None:
            for at, (owner, sample) in enumerate(samples):
                samples[at] = owner, self._continued(sample, owner, request.lockstep)
                request.tick("generating", at + 1, len(samples))
        return samples

    def streams(self, sites: Set[str]) -> Mapping[str, nn.Module]:
        return residual_streams(self.model, self._sites, TEXT_WIRINGS, sites)

    def stages(self, samples: Sequence[tuple[int, Sample]], sites: Set[str]) -> Iterator[Stage]:
        names = inspect.signature(self.model.forward).parameters
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        reads_head = any(self._sites[site] is head for site in sites)
        # Otherwise a decoder computes logits for every token.
        few = {"logits_to_keep": 1} if "logits_to_keep" in names and not reads_head else {}

        def forward(rows: Sequence[Row], copies: int) -> None:
            batch = self._batch([samples[row.number][1] for row in rows], copies)
            self.model(**batch, **({} if "labels" in batch else few))

        def mask(site: str, rows: Sequence[Row]) -> Tensor | None:
            name = self._mask_name(site)
            chosen = [samples[row.number][1] for row in rows]
            if name is None or name not in chosen[0]:
                return None
            return self._batch([{name: row[name]} for row in chosen], 1)[name].bool()

        rows = [Row(owner, number) for number, (owner, _) in enumerate(samples)]
        fewest = min(Counter(owner for owner, _ in samples).values())
        yield Stage("model", sorted(sites), rows, forward, mask, samples=fewest)

    def free_memory(self, wanted: int) -> int:
        return usable(free_memory(self.device))

    def _mask_name(self, site: str) -> str | None:
        """The mask for a site's tokens, a decoder's own or that of its input; not of images."""
        if self._decodes and ".decoder." in site:
            reads_encoder = any(mark in site for mark in _CROSS)
            leaf = site.rpartition(".")[2]
            if not (reads_encoder and leaf in ("k", "v", "k_proj", "v_proj", "key", "value")):
                return "decoder_attention_mask"
        elif "vision" in site or "visual" in site:
            return None
        elif any(mark in site for mark in _CROSS) and site.endswith(("key", "value")):
            return None  # keys and values from images
        return "attention_mask"

    def _batch(self, rows: Sequence[Sample], copies: int) -> dict[str, Tensor]:
        """Rows padded on the right to equal length, ``copies`` times."""
        if any(row.keys() != rows[0].keys() for row in rows):
            names = sorted({*rows[0]}.symmetric_difference(*rows[1:]))
            raise SettingsError(
                f"Samples have different arguments ({', '.join(names)} are not in all); every "
                "batch of every concept needs the same ones."
            )
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        pad = getattr(text, "pad_token_id", None) or 0
        batch: dict[str, Tensor] = {}
        for name, first in rows[0].items():
            parts = [row[name] for row in rows]
            if first.ndim == 2:
                length = max(part.shape[1] for part in parts)
                value = -100 if name == "labels" else pad if name.endswith("input_ids") else 0
                parts = [nn.functional.pad(p, (0, length - p.shape[1]), value=value) for p in parts]
            dtype = self.model.dtype if first.is_floating_point() else first.dtype
            batch[name] = torch.cat(parts * copies).to(self.device, dtype)
        return batch

    def _continued(self, sample: Sample, owner: int, lockstep: Lockstep) -> Sample:
        """The sample, extended by what its own LoRA generates; alone in its call, so no padding."""
        inputs = {name: tensor for name, tensor in sample.items() if name != "labels"}
        if "decoder_input_ids" not in inputs:
            inputs.pop("decoder_attention_mask", None)  # the labels' mask
        generated: list[Tensor] = []
        options = {"do_sample": False, "num_beams": 1, **(self._generate or {})}
        # Models write into their arguments (BLIP its start token).
        batch = self._batch([{name: tensor.clone() for name, tensor in inputs.items()}], 1)

        def run() -> None:
            generated.append(self.model.generate(**batch, **options))

        lockstep.run(MicroBatch(run, always=[owner]))
        ids = generated[0].cpu()[:, :-1]  # the last token is never read
        if not ids.shape[1]:
            raise BaseError("The model generated nothing; check the arguments of generate.")
        prefix = "decoder_" if self._decodes else ""
        mask, known = torch.ones_like(ids), inputs.get(f"{prefix}attention_mask")
        if known is not None and not known.all():
            same = min(known.shape[1], mask.shape[1])
            mask[:, :same] = known[:, :same]
        replaced = () if self._decodes else ("position_ids", "token_type_ids", "inputs_embeds")
        kept = {name: tensor for name, tensor in inputs.items() if name not in replaced}
        return {**kept, f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


def samples_of(concept: Concept, limit: int, *, decodes: bool) -> list[Sample]:
    """The concept's batches as rows without padding, at most ``limit``, with a mask for every kind
    of token, so that rows can be padded to equal length.

    ``decodes``: the model is an encoder-decoder. Raises :class:`IterisError` if there are no
    samples and :class:`SettingsError` for batches that are not tensors with rows first.
    """
    inputs: Any = concept.inputs
    if inputs is None:
        raise ConceptError(
            f"Concept {concept.name!r} has no inputs; a transformers host needs batches of keyword "
            "arguments (Concept(inputs=…))."
        )
    rows: list[Sample] = []
    batches: Any = inputs() if callable(inputs) else inputs
    for batch in batches:
        strange = [n for n, v in batch.items() if not isinstance(v, Tensor) or v.ndim == 0]
        if strange:
            raise SettingsError(
                f"Concept {concept.name!r}: {', '.join(strange)} of a batch are not tensors with "
                'rows; make batches with return_tensors="pt".'
            )
        tensors = dict(batch)
        for prefix in ("", "decoder_"):
            if (ids := tensors.get(f"{prefix}input_ids")) is not None:
                tensors.setdefault(f"{prefix}attention_mask", torch.ones_like(ids))
        if decodes and "labels" in tensors and tensors["labels"].ndim == 2:
            # The model reads the labels shifted by one: a token counts if it has one to predict.
            tensors.setdefault("decoder_attention_mask", (tensors["labels"] != -100).long())
        sizes = {len(value) for value in tensors.values()}
        if len(sizes) != 1:
            raise SettingsError(
                f"Concept {concept.name!r}: a batch has tensors of {sorted(sizes)} rows; "
                "all must have the same number."
            )
        rows += [
            _without_padding({name: value[i : i + 1].cpu() for name, value in tensors.items()})
            for i in range(sizes.pop())
        ]
        if len(rows) >= limit:
            break
    if not rows:
        raise ConceptError(f"Concept {concept.name!r} has no samples: its inputs are empty.")
    return rows[:limit]


def _without_padding(row: dict[str, Tensor]) -> Sample:
    """Cut masked tokens at either end, so that positions start where the model counts from.

    With left padding, decoders would otherwise number positions including the padding, and would
    continue from padding when they generate.
    """
    beside_encoder = "decoder_attention_mask" in row
    for mask_name, names in (
        ("attention_mask", [*_READ, *([] if beside_encoder else ["labels"])]),
        ("decoder_attention_mask", ["decoder_input_ids", "decoder_attention_mask", "labels"]),
    ):
        mask = row.get(mask_name)
        if mask is not None and mask.ndim == 2 and mask.any():
            kept = mask[0].nonzero().flatten().tolist()
            span = slice(0 if mask_name.startswith("decoder_") else kept[0], kept[-1] + 1)
            alike = [n for n in names if n in row and row[n].shape[:2] == mask.shape]
            row = row | {name: row[name][:, span] for name in alike}
    return row
