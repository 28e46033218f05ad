"""The node that writes a merged LoRA, and ComfyUI's folders for LoRAs, by names that reveal nothing
about this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..iteris_core.errors import IterisError, SaveError
from ..iteris_core.lora_files import DTYPES, read_header
from ..iteris_core.lora_files.embeddings import file_names, to_file, unbundled
from ..iteris_core.lora_files.tensors import (
    content_hash,
    file_digest,
    read_tensors,
    save_atomically,
)
from ..iteris_core.report.card import card_of, write_card
from .comfy_internals import optional
from .comfy_runtime import show_text, ui_text
from .lora_manager import is_free_for_metadata, metadata_file, write_metadata
from .merging import LoraModel as MergedLora
from .pictures import save_thumbnail
from .schema import LoraModel, schema

_AS_IT_IS = "as it is"
_HASH = "modelspec.hash_sha256"
_OURS = "iteris"
"""Keys of a file's metadata: the hash of its tensors, and the recipe that all our files have."""
_STAYS = (
    "\n{} is not as IterIS wrote it, so it stays, and no {} is saved. Move it, or save the LoRA "
    "under another name."
)


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
                io.Image.Input("thumbnail", optional=True, lazy=True),
                io.Boolean.Input("card", default=False, optional=True),
            ],
            outputs=("lora_name",),
            is_output_node=True,
        )

    @classmethod
    def check_lazy_status(cls, **values: Any) -> list[str]:
        """The file is written before its thumbnail is drawn, so a drawing that fails loses
        nothing."""
        if values.get("thumbnail", values) is not None:  # not connected, or drawn
            return []
        cls.execute(**values)
        return ["thumbnail"]

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
        tensors: dict[str, Tensor] = lora
        if dtype != _AS_IT_IS or rank:
            if not isinstance(lora, MergedLora):
                raise IterisError(
                    "Only a LoRA that an IterIS node made is saved in another dtype or at another "
                    f"rank; choose {_AS_IT_IS!r} and rank 0."
                )
            tensors = lora.at("" if dtype == _AS_IT_IS else dtype, rank)
        told: dict[str, str] = dict(getattr(tensors, "metadata", {}))
        metadata = {} if optional("comfy.cli_args.args.disable_metadata") else told
        own = {_OURS: metadata.get(_OURS, "{}"), _HASH: f"0x{content_hash(tensors)}"}
        metadata = {**metadata, **own}
        try:
            sources = told.get(_OURS, "") if overwrite else None
            file, subfolder = new_file(filename_prefix, folder, metadata, sources)
            lines = save_embeddings(tensors, subfolder)
            page, picture = file.with_suffix(".md"), file.with_suffix(".preview.png")
            free = _is_free_for_a_card(page, file)
            notes_free = is_free_for_metadata(file)
            if not _holds(file, metadata):
                save_atomically(dict(tensors), file, metadata)
            if thumbnail is not None and not save_thumbnail(thumbnail, picture):
                lines += _STAYS.format(picture.name, "thumbnail")
            if card and free:
                write_card(file)
            elif card:
                lines += _STAYS.format(page.name, "card")
            if card and notes_free:
                write_metadata(file)
            elif card:
                lines += _STAYS.format(metadata_file(file).name, "metadata")
        except SaveError as error:
            raise SaveError(f"{error} The merge is kept; queue again to save it.") from error
        except OSError as error:
            raise SaveError(
                f"{filename_prefix} cannot be written ({error.strerror}). Make its folder "
                "writable, or choose another. The merge is kept; queue again to save it."
            ) from error
        name = str(Path(subfolder) / file.name)
        text = f"{name}{lines}"
        show_text(f"Saved {text}", cls.hidden.unique_id)
        return io.NodeOutput(name, ui=ui_text(text))


_END = ".safetensors"
_DEFAULT = "default"


def folder_names() -> list[str]:
    """``default``, and the last two path parts of each other folder, numbered if ambiguous."""
    names = [_DEFAULT]
    for folder in folder_paths.get_folder_paths("loras")[1:]:
        name = "/".join(Path(folder).parts[-2:])
        names.append(name if name not in names else f"{name} ({len(names)})")
    return names


def new_file(
    prefix: str,
    folder: str = _DEFAULT,
    metadata: Mapping[str, str] = MappingProxyType({}),
    sources: str | None = None,
) -> tuple[Path, str]:
    """The file for a LoRA with this ``metadata``, and its folder below the one for LoRAs: a new
    one, the one that holds this very LoRA or, given a text with the hashes of its ``sources``, one
    of ours that may be overwritten. ``prefix`` supports Save Image's placeholders, such as
    %year%."""
    prefix = prefix.strip().removesuffix(_END)
    names = folder_names()
    if folder not in names:
        raise IterisError(f"There is no folder {folder} for LoRAs; choose from {', '.join(names)}.")
    at = names.index(folder)
    root = os.path.abspath(folder_paths.get_folder_paths("loras")[at])
    target = os.path.normpath(os.path.join(root, prefix))
    if not prefix or prefix.endswith(("/", os.sep)) or target == root:
        raise IterisError("Save Merged LoRA has no name; enter one as filename_prefix.")
    if not target.startswith(root + os.sep):
        raise IterisError(f"{prefix} is outside the folder for LoRAs; use a name or folder/name.")
    where, name, _, subfolder, _ = folder_paths.get_save_image_path(prefix, root)
    for file in numbered_files(Path(where), name):
        if not file.exists() or _holds(file, metadata):
            return file, subfolder
        if sources is not None:
            why = "" if _OURS in _metadata_of(file) else "IterIS did not write it"
            if not why and file_digest(file) in sources:
                why = "it is one of the LoRAs that were merged"
            if why:
                raise SaveError(
                    f"{file.name} is not overwritten: {why}. Choose another filename_prefix."
                )
            return file, subfolder
    raise AssertionError("numbers do not end")


def _holds(file: Path, metadata: Mapping[str, str]) -> bool:
    """True if the file is there and has the tensors whose hash ``metadata`` names."""
    return file.exists() and _HASH in metadata and _metadata_of(file).get(_HASH) == metadata[_HASH]


def _metadata_of(file: Path) -> Mapping[str, str]:
    try:
        return read_header(file)[1]
    except IterisError:  # a file of another kind
        return {}


def _is_free_for_a_card(page: Path, file: Path) -> bool:
    """True if no page is there, or just the card of ``file``."""
    try:
        there = page.read_text(encoding="utf-8") if page.exists() else None
    except UnicodeError:
        return False
    return there is None or there == card_of(file, _metadata_of(file))


def numbered_files(folder: Path, name: str) -> Iterator[Path]:
    """NAME.safetensors, NAME_2.safetensors, …"""
    return (folder / f"{name}{f'_{n}' if n > 1 else ''}{_END}" for n in count(1))


def how_to_call(lora: Mapping[str, Tensor]) -> str:
    """Lines that explain how to use a merged LoRA's embeddings with its CLIP."""
    embeddings, _ = unbundled(Path("merged"), lora)
    return "".join(
        f"\n  {name}: write embedding:{file_name}; Save Merged LoRA puts it into models/embeddings"
        for name, file_name in file_names(embeddings).items()
    )


def save_embeddings(lora: Mapping[str, Tensor], subfolder: str) -> str:
    """Write each embedding into ``subfolder`` of models/embeddings, without overwriting others;
    returns lines that explain how to use them."""
    embeddings, _ = unbundled(Path("merged"), lora)
    root = Path(folder_paths.get_folder_paths("embeddings")[0])
    text = ""
    for name, file_name in file_names(embeddings).items():
        tensors = to_file(name, embeddings[name])
        path = next(p for p in numbered_files(root / subfolder, file_name) if _is_free(p, tensors))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            save_atomically(tensors, path, {"name": name})
        called = path.relative_to(root).with_name(path.stem).as_posix()
        text += f"\nIts embedding {name}: write embedding:{called}"
    return text


def _is_free(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """True if the name is free, or the file holds just these vectors."""
    if any(path.with_suffix(end).exists() for end in (".pt", ".bin")):
        return False  # ComfyUI would accept either
    if not path.exists():
        return True
    try:
        there, _ = read_tensors(path)
    except IterisError:  # a file of another kind
        return False
    return there.keys() == tensors.keys() and all(
        torch.equal(there[key], tensors[key]) for key in tensors
    )
