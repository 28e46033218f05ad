"""The base of a command: its device, whether it exists, and how it is loaded."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..activations.memory import is_out_of_memory
from ..errors import BaseError, DeviceError, IterisError, OutOfMemory, brief
from ..lora import Lora
from ..lora_files import ReadOptions, is_lora, read_for_released, read_header

_INDEXES = ("model_index.json", "modular_model_index.json")
"""A diffusers pipeline folder has one of these files; a modular pipeline has the second."""
BUNDLED = {"toybox": "weights/base"}
"""Bases that ship with the project: name of their package → folder in it. In place of a path, such
a name always means the bundled base."""


def located(base: str) -> str:
    """``base``, or the folder of the bundled base of that name."""
    package = importlib.util.find_spec(base) if base in BUNDLED else None
    folders = package.submodule_search_locations if package is not None else None
    return str(Path(folders[0], BUNDLED[base])) if folders else base


def device_of(device: str | None = None) -> str:
    """``device`` if it exists, checked before anything is loaded, or the best available one."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise DeviceError(
            f"--device {device!r} is not a torch device; give cpu, cuda, cuda:1, …"
        ) from error
    backend = getattr(torch, kind, None)
    available = getattr(backend, "is_available", None)
    if kind == "mps":
        available = torch.backends.mps.is_available
    if available is not None and not available():
        raise DeviceError(
            f"--device {device}: torch {torch.__version__} finds no {kind} device here. Omit "
            "--device to use the best one, or give cpu."
        )
    return device


def check_base(base: str) -> None:
    """Raise :class:`IterisError` for a local path that cannot be a diffusers base."""
    base = located(base)
    path = Path(base)
    if path.is_dir() and not any((path / name).is_file() for name in _INDEXES):
        raise BaseError(
            f"The base {base!r} cannot be loaded: the folder has no model_index.json. Give a "
            "folder with a pipeline of diffusers, a .safetensors checkpoint or a hub name. For a "
            "transformers model, merge in Python with TransformersHost."
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise BaseError(
            f"The base {base!r} is not a .safetensors file. Give a folder with a pipeline of "
            "diffusers, a .safetensors checkpoint or a hub name; files of other kinds are not "
            "opened."
        )
    if path.is_file() and is_lora(read_header(path)[0]):
        raise BaseError(
            f"The base {base!r} is a LoRA, not a model; give the model for which it was made. "
            "LoRAs are given by --concept to merge, and by --lora to bake."
        )
    if not path.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        raise BaseError(
            f"The base {base!r} does not exist: there is no such folder or file, and a hub name "
            "has the form OWNER/NAME."
        )


def load_base(
    base: str, device: str | None, dtype: str | None = None, offload: str | None = None
) -> Any:
    """The pipeline from a folder, a hub name, a single file or the name of a bundled base. For a
    single file, its contents decide the class, and diffusers fetches the released model's
    configuration from the hub."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from ..hosts.diffusers_loop import is_modular, progress_bars
    from ..hosts.diffusers_lora import single_file_pipeline

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    device, base = device_of(device), located(base)
    check_base(base)
    try:
        if base.endswith(".safetensors"):
            of_file = single_file_pipeline(Path(base)) if Path(base).is_file() else None
            pipeline = (of_file or StableDiffusionPipeline).from_single_file(base)
        else:
            pipeline = _whole_pipeline(base)
        if dtype is None and device == "cpu":
            dtype = "float32"
        half = "float16" if hasattr(pipeline, "unet") else "bfloat16"
        pipeline.to(dtype=getattr(torch, dtype or half))
        if offload is not None and is_modular(pipeline):
            raise BaseError(
                f"The base {base!r} is a modular pipeline, which --offload cannot move. Omit the "
                "option, or load it in Python with a ComponentsManager that offloads it."
            )
        if offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        else:
            pipeline.to(device)
    except IterisError:
        raise
    except Exception as error:  # libraries raise many types; their message is what helps
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"Out of memory while loading the base {base!r} ({brief(error)}); try "
                "--offload model, --base-dtype bfloat16, or a device with more memory."
            ) from error
        here = "" if Path(base).exists() else " There is no folder or file of that name here."
        raise BaseError(
            f"The base {base!r} cannot be loaded ({brief(error)}).{here} Give a folder with a "
            "pipeline of diffusers, a .safetensors checkpoint or a hub name."
        ) from error
    for bar in progress_bars(pipeline):
        bar.set_progress_bar_config(disable=True)
    return pipeline


def _whole_pipeline(base: str) -> Any:
    """The pipeline from a folder or hub name; only safetensors are loaded."""
    from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    whole, modular = _INDEXES
    if not (Path(base) / modular).is_file():
        try:
            return DiffusionPipeline.from_pretrained(base, use_safetensors=True)
        except OSError as error:
            if whole not in str(error) or Path(base).exists():
                raise
    pipeline: Any = ModularPipeline.from_pretrained(base)
    pipeline.load_components(use_safetensors=True)
    return pipeline


def lora_reader(base: str | None) -> Callable[[Path, ReadOptions], Lora]:
    """Reads LoRA files for the ``base``, or each for the bundled or released base of its own."""

    @functools.cache
    def host_for(base: str) -> Any:
        check_base(base)
        from ..hosts.diffusers import DiffusersHost

        return DiffusersHost(load_base(base, "cpu"))

    def read(path: Path, options: ReadOptions) -> Lora:
        named = base or read_header(path)[1].get("ss_sd_model_name", "")
        read_lora = host_for(named).read_lora if base or named in BUNDLED else read_for_released
        return read_lora(path, options)

    return read
