"""LoRAs of models with two denoisers (Wan 2.2 14B): one file for high noise, one for low noise.

Both files contain the same names. In a merge the sites of the second denoiser have its own prefix,
``transformer_2.…`` instead of ``transformer.…``.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import IterisError, LoraFileError, OutputError, SaveError, brief
from ..lora import Lora, LowRank
from ..saving import interrupts_wait
from .embeddings import without_embeddings
from .write import Layout, name_of, write_loras

_log = logging.getLogger(__name__)
HIGH, LOW = "high_noise", "low_noise"
_LONG = 200
"""Bytes of a file name to which a longer ending may still be added; most systems allow 255."""


def second_of(denoiser: str) -> str:
    """The component name of the denoiser for low noise."""
    return f"{denoiser}_2"


def joined_experts(high: Lora, low: Lora, denoiser: str) -> Lora:
    """One LoRA for both denoisers; text encoders come from ``high``, regardless of ``low``.

    Raises :class:`IterisError` if a file has nothing for its denoiser.
    """
    second = _renamed(low.sites, f"{denoiser}.", f"{second_of(denoiser)}.")
    for lora, sites in ((high, high.sites), (low, second)):
        if not sites:
            raise LoraFileError(f"{lora.source or lora.name} changes nothing in the {denoiser}.")
    return replace(
        high,
        sites={**high.sites, **second},
        notes=[*high.notes, *low.notes],
        source=f"{high.source}+{low.source}",
        sha256=f"{high.sha256}+{low.sha256}",
    )


def split_experts(lora: Lora, denoiser: str) -> tuple[Lora, Lora]:
    """The first denoiser and text encoders; and the second, under the first one's names."""
    first, second = f"{denoiser}.", f"{second_of(denoiser)}."
    low_sites, metadata = _renamed(lora.sites, second, first), without_embeddings(lora.metadata)
    low = replace(lora, sites=low_sites, metadata=metadata, embeddings={})
    sites = {site: change for site, change in lora.sites.items() if not site.startswith(second)}
    return replace(lora, sites=sites), low


def by_expert(lora: Lora) -> tuple[Lora, ...]:
    """``lora``, or its two parts if it changes the second denoiser of its base."""
    denoiser = "" if lora.base is None else lora.base.architecture.denoiser
    if any(site.startswith(f"{second_of(denoiser)}.") for site in lora.sites):
        return split_experts(lora, denoiser)
    return (lora,)


def by_file(lora: Lora, path: Path) -> dict[Path, Lora]:
    """What to write for ``lora``: the file ``path``, or one for each of two experts."""
    parts = by_expert(lora)
    return dict(zip([path] if len(parts) == 1 else expert_files(path), parts, strict=True))


def write_or_keep(
    lora: Lora,
    path: Path,
    *,
    layout: Layout | None = None,
    dtype: str | torch.dtype = "float16",
    overwrite: bool = False,
) -> list[Path]:
    """Like :func:`.write_lora`, so that hours of merging are not lost. A LoRA for two experts
    becomes two files. Returns the paths. Ctrl-C takes effect when they are complete.

    Values that do not fit in ``dtype`` are written as float32, with a warning. If ``path`` or
    ``layout`` cannot be written at all, for whatever reason, the LoRA goes into the system's folder
    for temporary files, in the base's own layout as float32, and the error says where it is.
    """
    dtype, loras = name_of(dtype), by_file(lora, path)
    with interrupts_wait():
        try:
            return write_loras(loras, layout=layout, dtype=dtype, overwrite=overwrite)
        except BaseException as error:
            failed = error
        if dtype != "float32" and isinstance(failed, OutputError):
            try:
                paths = write_loras(loras, layout=layout, dtype="float32", overwrite=overwrite)
            except BaseException as error:
                failed = error
            else:
                _log.warning("Written as float32, not %s: %s", dtype, failed)
                return paths
        raise rescued(lora, path.name, failed)


def rescued(lora: Lora, name: str, error: BaseException) -> BaseException:
    """``error`` as an :class:`IterisError`, with the file below the system's temporary folder in
    which ``lora`` is, if any. What is no :class:`Exception` is returned, and a warning names the
    file."""
    where = ""
    with suppress(Exception):
        folder = Path(tempfile.mkdtemp(prefix="iteris-"))
        file = folder / (name if len(os.fsencode(name)) < _LONG else "merged.safetensors")
        try:
            files = write_loras(by_file(lora, file), dtype="float32")
        except BaseException:
            folder.rmdir()
            raise
        where = f"The merge is not lost: it is in {' and '.join(map(str, files))}."
    if not isinstance(error, Exception):
        _log.warning("%s", where)
        return error
    kind, said = SaveError, f"{name} cannot be written ({brief(error)})."
    if isinstance(error, IterisError):
        kind, said = type(error), str(error)
    told = kind(f"{said} {where}".strip())
    told.__cause__ = error
    return told


def expert_files(path: Path) -> tuple[Path, Path]:
    """The files for both LoRAs: ``<stem>_high_noise`` and ``<stem>_low_noise``."""
    high, low = (path.with_name(f"{path.stem}_{end}{path.suffix}") for end in (HIGH, LOW))
    return high, low


def _renamed(sites: Mapping[str, LowRank], old: str, new: str) -> dict[str, LowRank]:
    """The changes of sites that start with ``old``, with that prefix replaced by ``new``."""
    return {new + site.removeprefix(old): c for site, c in sites.items() if site.startswith(old)}
