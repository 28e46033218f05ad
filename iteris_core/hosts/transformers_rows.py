"""Samples of a transformers model as one-sample rows: splitting and collating batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..concepts import Concept
from ..errors import ConceptError, SettingsError

Row = Mapping[str, Tensor]
"""Keyword arguments of the model's forward, with a batch dimension of 1"""

_READ = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "attention_mask")


def rows_of(concept: Concept, limit: int, *, decodes: bool) -> list[Row]:
    """The concept's batches as rows without padding, at most ``limit``.

    ``decodes``: the model is an encoder-decoder. Raises :class:`IterisError` if there are no
    samples and :class:`SettingsError` for batches that are not tensors with rows first.
    """
    inputs: Any = concept.inputs
    if inputs is None:
        raise ConceptError(
            f"Concept {concept.name!r} has no inputs; a transformers host needs batches of keyword "
            "arguments (Concept(inputs=…))."
        )
    rows: list[Row] = []
    batches: Any = inputs() if callable(inputs) else inputs
    for batch in batches:
        strange = [n for n, v in batch.items() if not isinstance(v, Tensor) or v.ndim == 0]
        if strange:
            raise SettingsError(
                f"Concept {concept.name!r}: {', '.join(strange)} of a batch are not tensors with "
                'rows; make batches with return_tensors="pt".'
            )
        tensors = _with_masks(batch, decodes)
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


def collate(rows: Sequence[Row], copies: int, pad: int) -> dict[str, Tensor]:
    """Rows padded on the right to equal length, ``copies`` times."""
    if any(row.keys() != rows[0].keys() for row in rows):
        names = sorted({*rows[0]}.symmetric_difference(*rows[1:]))
        raise SettingsError(
            f"Samples have different arguments ({', '.join(names)} are not in all); every batch of "
            "every concept needs the same ones."
        )
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if parts[0].ndim == 2:
            length = max(part.shape[1] for part in parts)
            value = -100 if name == "labels" else pad if name.endswith("input_ids") else 0
            parts = [nn.functional.pad(p, (0, length - p.shape[1]), value=value) for p in parts]
        batch[name] = torch.cat(parts * copies)
    return batch


def extended(row: Row, ids: Tensor, *, decodes: bool) -> Row:
    """``row`` with the tokens ``ids``, (1, tokens), that a decoder has read so far."""
    prefix = "decoder_" if decodes else ""
    mask = torch.ones_like(ids)
    given = row.get(f"{prefix}attention_mask")
    if given is not None and not given.all():
        same = min(given.shape[1], mask.shape[1])
        mask[:, :same] = given[:, :same]
    replaced = () if decodes else ("position_ids", "token_type_ids", "inputs_embeds")
    kept = {name: tensor for name, tensor in row.items() if name not in replaced}
    return {**kept, f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


def _with_masks(batch: Mapping[str, Tensor], decodes: bool) -> dict[str, Tensor]:
    """The batch with a mask for every kind of token, so that rows can be padded to equal length."""
    masked = dict(batch)
    if "input_ids" in masked:
        masked.setdefault("attention_mask", torch.ones_like(masked["input_ids"]))
    if "decoder_input_ids" in masked:
        ones = torch.ones_like(masked["decoder_input_ids"])
        masked.setdefault("decoder_attention_mask", ones)
    elif decodes and "labels" in masked and masked["labels"].ndim == 2:
        # The model reads the labels shifted by one: a token counts if it has one to predict.
        masked.setdefault("decoder_attention_mask", (masked["labels"] != -100).long())
    return masked


def _without_padding(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut masked tokens at either end, so that positions start where the model counts from.

    With left padding, decoders would otherwise number positions including the padding, and would
    continue from padding when they generate.
    """
    cut = dict(row)
    mask = row.get("attention_mask")
    read = row.get("input_ids", row.get("inputs_embeds"))
    if mask is not None and read is not None and mask.shape == read.shape[:2] and mask.any():
        kept = mask[0].nonzero()
        names = [*_READ, *([] if "decoder_attention_mask" in row else ["labels"])]
        span = slice(int(kept[0]), int(kept[-1]) + 1)
        cut |= {n: row[n][:, span] for n in names if n in row and row[n].shape[:2] == mask.shape}
    mask = row.get("decoder_attention_mask")
    if mask is not None and mask.ndim == 2 and mask.any():
        span = slice(int(mask[0].nonzero()[-1]) + 1)
        names = ["decoder_input_ids", "decoder_attention_mask", "labels"]
        cut |= {n: row[n][:, span] for n in names if n in row and row[n].shape == mask.shape}
    return cut
