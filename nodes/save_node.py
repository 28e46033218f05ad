"""The node that writes a merged LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..iteris_core.errors import IterisError, SaveError
from ..iteris_core.lora import Lora, LowRank
from ..iteris_core.lora_files import DTYPES
from ..iteris_core.lora_files.tensors import content_hash, save_atomically
from ..iteris_core.report.card import write_card
from ..iteris_core.report.provenance import cut_lora
from .comfy_runtime import show_text
from .lora_folders import folder_names, new_file, save_embeddings
from .merging import LoraModel as MergedLora
from .pictures import save_thumbnail
from .schema import LoraModel, schema

_AS_IT_IS = "as it is"


class SaveMergedLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        folders = folder_names()
        return schema(
            "IterisSaveLora",
            ["save lora", "export lora", "bake loras"],
            inputs=[
                LoraModel.Input("lora"),
                io.String.Input("filename_prefix", default="iteris/merged"),
                io.Int.Input("rank", default=0, min=0, max=1024, optional=True),
                io.Combo.Input(
                    "dtype", options=[_AS_IT_IS, *DTYPES], default=_AS_IT_IS, optional=True
                ),
                io.Combo.Input("folder", options=folders, default=folders[0], optional=True),
                io.Boolean.Input("overwrite", default=False, optional=True),
                io.Image.Input("thumbnail", optional=True),
                io.Boolean.Input("card", default=False, optional=True),
            ],
            outputs=("lora_name",),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        lora: dict[str, Any],
        filename_prefix: str,
        rank: int = 0,
        dtype: str = _AS_IT_IS,
        folder: str = "default",
        overwrite: bool = False,
        thumbnail: Tensor | None = None,
        card: bool = False,
    ) -> io.NodeOutput:
        tensors, metadata = _at(lora, dtype)
        if rank:
            ordered = getattr(lora, "ordered", False)
            tensors, metadata = cut_tensors(tensors, metadata, rank, ordered=ordered)
        file, subfolder = new_file(filename_prefix, folder, overwrite=overwrite)
        try:
            embeddings = save_embeddings(tensors, subfolder)
            save_atomically(tensors, file, metadata)
            if thumbnail is not None:
                save_thumbnail(thumbnail, file.with_suffix(".preview.png"))
            if card:
                write_card(file)
        except SaveError as error:
            raise SaveError(f"{error} The merge is cached; queue again to save it.") from error
        name = str(Path(subfolder) / file.name)
        text = f"{name}{embeddings}"
        show_text(f"Saved {text}", cls.hidden.unique_id)
        return io.NodeOutput(name, ui={"text": [text]})


def _at(lora: dict[str, Any], dtype: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata in ``dtype``."""
    if dtype != _AS_IT_IS and isinstance(lora, MergedLora):
        lora = lora.at(dtype)
    metadata = dict(getattr(lora, "metadata", {}))
    if dtype == _AS_IT_IS or isinstance(lora, MergedLora):
        return dict(lora), metadata
    tensors: dict[str, Tensor] = {}
    for key, tensor in lora.items():
        kept = key.endswith(".alpha") or not tensor.is_floating_point()
        tensors[key] = tensor if kept else tensor.to(DTYPES[dtype]).contiguous()
        if not kept and not bool(torch.isfinite(tensors[key]).all()):
            raise IterisError(f"{key}: values do not fit in {dtype}; save as bfloat16 or float32.")
    if "modelspec.hash_sha256" in metadata:
        metadata["modelspec.hash_sha256"] = "0x" + content_hash(tensors)
    return tensors, metadata


_UP, _DOWN, _ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"


def cut_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], rank: int, *, ordered: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in kohya layout and their metadata, with every module cut to ``rank``; ``ordered`` as
    in :func:`..iteris_core.linalg.lowrank.at_rank`. Tensors in other layouts stay as they are."""
    cut = cut_lora(_larger(tensors, metadata, rank), rank, ordered=ordered)
    smaller = dict(tensors)
    for name, change in cut.sites.items():
        up, down = tensors[name + _UP], tensors[name + _DOWN]
        new_up = change.up.reshape(len(up), -1, *up.shape[2:])
        smaller[name + _UP] = new_up.to(up.dtype).contiguous()
        smaller[name + _DOWN] = change.down.reshape(-1, *down.shape[1:]).to(down.dtype).contiguous()
        if name + _ALPHA in tensors:
            smaller[name + _ALPHA] = tensors[name + _ALPHA] * (rank / up.shape[1])
    numbers = {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    if "modelspec.hash_sha256" in metadata:
        numbers["modelspec.hash_sha256"] = "0x" + content_hash(smaller)
    return smaller, {**cut.metadata, **numbers}


def _larger(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], rank: int) -> Lora:
    """The modules above ``rank``, by name in the file, without their scales."""
    sites: dict[str, LowRank] = {}
    for key, up in tensors.items():
        if key.endswith(_UP) and up.shape[1] > rank:
            name = key.removesuffix(_UP)
            down = tensors[name + _DOWN]
            sites[name] = LowRank(up.flatten(1).float(), down.flatten(1).float())
    return Lora(sites, metadata=metadata)
