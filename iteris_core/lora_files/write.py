"""Writes a LoRA so that every tool reads it in full.

ComfyUI, A1111, Forge, InvokeAI, diffusers and sd-scripts read ``kohya`` for SD 1.x, 2.x and XL, and
for FLUX's blocks and CLIP. It uses sd-scripts' module names, so q, k and v of FLUX and SD 3 are
fused. A warning lists what diffusers cannot read: T5, and in this layout SD 3 and the rest of FLUX.
For those write ``peft``, which ComfyUI reads too. In both layouts alpha equals rank where that is
exact, so loaders that ignore alpha get it right as well.

In kohya layout a UNet and a CLIP text encoder have one alpha each, because diffusers loses alphas
that differ between sites (``Architecture.one_alpha``). Factors that are rounded anyway are scaled
to it; exact ones of a smaller rank are scaled by a power of two or padded with zeros. A text
encoder that has attention sites but no ``out_proj`` (in peft layout: no attention) gets one pair of
zero factors for ``out_proj``, by which diffusers recognises the layout. Zeros change nothing.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..architectures.record import Alias, BaseModel, file_rows
from ..architectures.unet import SD1
from ..errors import OutputError
from ..lora import Lora, LowRank
from ..saving import check_new, together
from .aliases import base_model
from .embeddings import embedding_files, to_file
from .factors import lora_config, store_all, stored_factors
from .tensors import content_hash, save_tensors

Layout = Literal["kohya", "peft"]

DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}

_log = logging.getLogger(__name__)


def write_lora(
    lora: Lora,
    path: str | Path,
    *,
    layout: Layout | None = None,
    dtype: str | torch.dtype = "float16",
    overwrite: bool = False,
) -> Path:
    """Write ``lora`` and return the path; the file appears under its name only when complete.

    The default ``layout`` is kohya, or peft for a base without kohya names. Raises
    :class:`IterisError` if the file exists (unless ``overwrite``), a value does not fit in
    ``dtype`` or a site has no name in ``layout``. If the disk is full, raises :class:`SaveError`:
    no partial file is left, and an older file of that name is unchanged.
    """
    return write_loras({Path(path): lora}, layout=layout, dtype=dtype, overwrite=overwrite)[0]


def write_loras(
    loras: Mapping[Path, Lora],
    *,
    layout: Layout | None = None,
    dtype: str | torch.dtype = "float16",
    overwrite: bool = False,
) -> list[Path]:
    """Write each like :func:`write_lora`, with its embeddings: all of these files, or none."""
    files: dict[Path, tuple[dict[str, Tensor], dict[str, str]]] = {}
    for path, lora in loras.items():
        check_target(path, layout, dtype, overwrite)
        files[path] = to_tensors(lora, layout=layout, dtype=dtype)
        for name, target in embedding_files(path, list(lora.embeddings)).items():
            check_new(target, overwrite=overwrite)
            files[target] = to_file(name, lora.embeddings[name]), {"name": name}
    with together() as beside:
        for path, (tensors, metadata) in files.items():
            save_tensors(tensors, beside(path), metadata)
    for lora in loras.values():
        _warn_of_unread(lora, layout or _own_layout(lora))
    return list(loras)


def to_tensors(
    lora: Lora, *, layout: Layout | None = None, dtype: str | torch.dtype = "float16"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) as written by :func:`write_lora`, without embeddings.

    Raises :class:`IterisError` if there is nothing to write, a value does not fit in ``dtype`` or a
    site has no name in ``layout``.
    """
    if not lora.sites:
        raise OutputError("The merged LoRA changes no site; there is nothing to write.")
    layout, base, dtype = layout or _own_layout(lora), lora.base, DTYPES[name_of(dtype)]
    if base is None:  # names as in SD 1.x
        shapes: dict[str, tuple[int, ...]] = {}
        for site, change in lora.sites.items():
            kernel = change.kernel or ()
            shapes[site] = (change.shape[0], change.shape[1] // math.prod(kernel), *kernel)
        base = base_model(SD1, shapes)
    one_alpha = base.architecture.one_alpha
    lora = replace(lora, sites=_as_wide_as_projections(lora.sites))
    stored = store_all(lora, dtype, one_alpha, even=layout == "kohya")
    metadata = {key: str(value) for key, value in lora.metadata.items()}
    metadata.pop("lora_adapter_metadata", None)
    tensors: dict[str, Tensor] = {}
    if layout == "kohya":
        modules = _kohya(base, stored)
        # What sd-scripts and A1111 show: the most common rank and alpha.
        ranks = [module.rank for module in modules.values()]
        dim = max(set(ranks), key=ranks.count)
        scales = [module.scale for module in modules.values() if module.rank == dim]
        alpha = dim * max(set(scales), key=scales.count)
        stored.clear()
        for name in list(modules):
            module = modules.pop(name)  # so that memory holds one copy, not two
            up, down = stored_factors(module, dtype)
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
        metadata |= {"ss_network_dim": str(dim), "ss_network_alpha": f"{alpha:g}"}
        if base.architecture.network:
            metadata["ss_network_module"] = base.architecture.network
        if lora.base is not None and base.architecture.version:
            metadata["ss_base_model_version"] = base.architecture.version
    else:
        stored |= _recognisable(stored, {site: site for site in stored}, "peft")
        metadata["lora_adapter_metadata"] = json.dumps(_peft_metadata(stored))
        for site in list(stored):
            up, down = stored_factors(stored.pop(site), dtype)
            # Sites may share a down matrix in memory; safetensors refuses that.
            tensors |= {f"{site}.lora_A.weight": down.clone(), f"{site}.lora_B.weight": up}
    if "modelspec.sai_model_spec" in metadata:
        metadata["modelspec.hash_sha256"] = "0x" + content_hash(tensors)
    return tensors, {**metadata, "format": "pt"}


def _as_wide_as_projections(sites: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """All layers of a text encoder at one rank, filled up with zeros, if its projection is among
    them: diffusers loads a projection at the rank of the other layers."""
    padded = dict(sites)
    for encoder in [s.partition(".")[0] for s in sites if s.endswith(".text_projection")]:
        changes = {s: change for s, change in sites.items() if s.partition(".")[0] == encoder}
        widest = max(change.rank for change in changes.values())
        padded |= {site: change.padded(widest) for site, change in changes.items()}
    return padded


def _own_layout(lora: Lora) -> Layout:
    return "kohya" if lora.base is None or lora.base.written else "peft"


def _warn_of_unread(lora: Lora, layout: Layout) -> None:
    if lora.base is None:
        return
    reads = lora.base.architecture.diffusers_reads
    unread = [site for site in lora.sites if not reads(site, layout)]
    if unread:
        _log.warning(
            "diffusers does not read %d of the %d changes in this file, such as %s. %s",
            len(unread), len(lora.sites), unread[0],
            "ComfyUI does; for diffusers write peft." if layout == "kohya" else "ComfyUI does.",
        )  # fmt: skip


def name_of(dtype: str | torch.dtype) -> str:
    """ "float16" for torch.float16 or "float16"; raises :class:`IterisError` for others."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise OutputError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}.")
    return name


def check_target(path: Path, layout: str | None, dtype: str | torch.dtype, overwrite: bool) -> None:
    """Raise :class:`IterisError` if :func:`write_lora` would, before any work is done."""
    name_of(dtype)
    if layout not in (None, "kohya", "peft"):
        raise OutputError(f'layout must be "kohya" or "peft", not {layout!r}.')
    if path.suffix != ".safetensors":
        raise OutputError(f"{path} must end in .safetensors.")
    check_new(path, overwrite=overwrite)


def _kohya(base: BaseModel, stored: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Modules by the names to write, fused where the names are."""
    names = {n: a for n, a in base.written.items() if any(piece.site in stored for piece in a)}
    missing = stored.keys() - {piece.site for alias in names.values() for piece in alias}
    if missing:
        raise OutputError(
            f"Site {min(missing)} has no name in kohya layout for a base of "
            f'{base.architecture.title}; write layout="peft", or read the LoRAs through a host, '
            "which says what base it has."
        )
    modules: dict[str, LowRank] = {}
    for name, alias in names.items():
        whole = len(alias) == 1 and len(alias[0].rows) == 1
        modules[name] = stored[alias[0].site] if whole else _fuse(name, alias, stored)
    return modules | _recognisable(modules, {n: names[n][0].site for n in modules}, "kohya")


def _fuse(name: str, alias: Alias, stored: Mapping[str, LowRank]) -> LowRank:
    """One module from its pieces: side by side, or with a single ``down`` if they share it."""
    present = [piece for piece in alias if piece.site in stored]
    parts = [stored[piece.site] for piece in present]
    if len({part.scale for part in parts}) > 1:
        raise OutputError(
            f"{name}: its parts {', '.join(p.site for p in present)} have different scales that "
            "half precision cannot hold; write float32."
        )
    first = parts[0]
    shared = all(torch.equal(part.down, first.down) for part in parts)
    down = first.down if shared else torch.cat([part.down for part in parts])
    up = torch.zeros(file_rows(alias), down.shape[0], dtype=down.dtype)
    column = 0
    for piece, part in zip(present, parts, strict=True):
        piece.place(part.up, up[:, column : column + part.rank])
        column += 0 if shared else part.rank
    # Side by side, scale = alpha / rank holds for the whole, regardless of the parts' ranks.
    return LowRank(up, down, first.kernel, first.scale)


def _recognisable(
    modules: Mapping[str, LowRank], sites: Mapping[str, str], layout: Layout
) -> dict[str, LowRank]:
    """Zero factors for an ``out_proj`` of each CLIP encoder that diffusers would not recognise: in
    kohya layout by that module, in peft layout by its attention. ``sites`` are by module."""
    kohya = layout == "kohya"
    mark, dot = (".self_attn.out_proj", "_") if kohya else (".self_attn.", ".")
    known = {site.partition(".")[0] for site in sites.values() if mark in site}
    added: dict[str, LowRank] = {}
    for name, like in modules.items():
        encoder, _, layer = sites[name].partition(".")
        stem, attention, _ = layer.rpartition(".self_attn.")
        needed = layer.startswith("text_model.") and (attention or not kohya)
        end = dot + layer.replace(".", dot)
        if not (needed or layer == "text_projection") or encoder in known or not name.endswith(end):
            continue
        known.add(encoder)
        path = f".{stem if attention else 'text_model.encoder.layers.0'}.self_attn.out_proj"
        width = like.up.shape[0] if layer.endswith(".fc2") else like.down.shape[1]
        up, down = like.up.new_zeros(width, like.rank), like.up.new_zeros(like.rank, width)
        added[name.removesuffix(end) + path.replace(".", dot)] = LowRank(up, down, scale=like.scale)
    return added


def _peft_metadata(stored: Mapping[str, LowRank]) -> dict[str, object]:
    """``lora_adapter_metadata`` as diffusers writes it: a LoraConfig for each component."""
    config: dict[str, object] = {}
    for component in sorted({site.partition(".")[0] for site in stored}):
        # transformers 5 dropped ``text_model.`` from the module names that peft compares with.
        modules = {
            site.removeprefix(f"{component}.").removeprefix("text_model."): (c.rank, c.alpha)
            for site, c in stored.items()
            if site.startswith(f"{component}.")
        }
        # Patterns match name ends: without a mark, FLUX's ``proj_out`` would match every block's.
        # Text encoders get no mark, because ``text_model.`` may come first.
        fields = lora_config(modules, "" if component.startswith("text") else "^")
        config |= {f"{component}.{name}": value for name, value in fields.items()}
    return config
