"""The node that writes a merged LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..iteris_core.errors import IterisError, SaveError
from ..iteris_core.lora_files import DTYPES
from ..iteris_core.lora_files.tensors import save_atomically
from ..iteris_core.report.card import write_card
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
        tensors = _at(lora, dtype, rank)
        metadata: dict[str, str] = getattr(tensors, "metadata", {})
        file, subfolder = new_file(filename_prefix, folder, overwrite=overwrite)
        try:
            embeddings = save_embeddings(tensors, subfolder)
            save_atomically(dict(tensors), file, dict(metadata))
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


def _at(lora: dict[str, Any], dtype: str, rank: int) -> dict[str, Tensor]:
    """``lora`` in ``dtype``, and with every layer cut to ``rank`` unless that is 0."""
    if dtype == _AS_IT_IS and not rank:
        return lora
    if not isinstance(lora, MergedLora):
        raise IterisError(
            "Only a LoRA that an IterIS node made is saved in another dtype or at another rank; "
            f"choose {_AS_IT_IS!r} and rank 0."
        )
    return lora.at("" if dtype == _AS_IT_IS else dtype, rank)
