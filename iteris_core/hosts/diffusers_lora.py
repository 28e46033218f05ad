"""A diffusers pipeline: its class, sites and architecture, and LoRA files for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import ARCHITECTURES, Architecture, architecture_of_sites
from ..architectures.sites import named_sites, other_parameters, plain_weight, weight_shape
from ..architectures.text import CONNECTORS
from ..errors import BaseError, IterisError, OutputError, brief
from ..lora import Lora
from ..lora_files import BaseModel, ReadOptions, base_model, read_header, read_lora_file, write_lora
from ..lora_files.aliases import file_names
from ..lora_files.experts import by_expert
from .diffusers_converters import by_loader
from .peft_layers import peft_layers
from .protocol import check_uncompiled

OF_TEXT = ("text_encoder", *CONNECTORS)
"""Name prefixes of the components that run before the denoiser, on text only."""

COMPONENTS = (
    *("unet", "transformer", "transformer_2"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", *CONNECTORS),
)


def pipeline_sites(pipeline: Any) -> dict[str, nn.Module]:
    """Linear and Conv2d modules of every component that a LoRA may change. Raises
    :class:`IterisError` if a component is compiled."""
    sites: dict[str, nn.Module] = {}
    for name, model in _components(pipeline):
        check_uncompiled(model)
        sites |= named_sites(name, model)
    return sites


def pipeline_parameters(pipeline: Any) -> dict[str, nn.Module]:
    """The module of every parameter that is not the weight of a site, by parameter name."""
    found: dict[str, nn.Module] = {}
    for name, model in _components(pipeline):
        found |= other_parameters(name, model)
    return found


def _components(pipeline: Any) -> Iterator[tuple[str, nn.Module]]:
    for name in COMPONENTS:
        model = getattr(pipeline, name, None)
        if isinstance(model, nn.Module):
            yield name, model


def base_of(pipeline: Any, sites: Mapping[str, nn.Module]) -> BaseModel:
    """The base model of a pipeline: a built-in one, or one with the names of the pipeline's own
    LoRA loader. Raises :class:`IterisError` for a pipeline without a denoiser or a loader."""
    shapes = {site: weight_shape(module) for site, module in sites.items()}
    kind = architecture_of_sites(shapes)
    if kind is not None and _is_of(pipeline, kind):
        return base_model(kind, shapes, pipeline_parameters(pipeline))
    loaded = loaded_components(pipeline)
    denoiser = next((name for name in ("unet", "transformer") if name in loaded), None)
    if denoiser is None or not any(site.startswith(f"{denoiser}.") for site in shapes):
        titles = ", ".join(known.title for known in ARCHITECTURES)
        raise BaseError(
            f"{type(pipeline).__name__} has no supported unet or transformer; supported are "
            f"{titles}, and pipelines into which diffusers loads LoRAs."
        )
    record = Architecture("diffusers", type(pipeline).__name__, denoiser=denoiser)
    read = {site: shape for site, shape in shapes.items() if site.partition(".")[0] in loaded}
    # No kohya names: for these pipelines few loaders read them back.
    return BaseModel(record, read, file_names(record, read), {})


def loaded_components(pipeline: Any) -> list[str]:
    """The components for which the pipeline's own loader reads changes; of text encoders, only
    CLIP."""
    named: Sequence[str] = getattr(type(pipeline), "_lora_loadable_modules", ())
    return [
        name
        for name in named
        if isinstance(part := getattr(pipeline, name, None), nn.Module)
        and (not name.startswith("text_encoder") or type(part).__name__.startswith("CLIPText"))
    ]


def _is_of(pipeline: Any, kind: Architecture) -> bool:
    """True if the denoiser's class matches the record, if it names one. Other classes have sites
    with the same names (FLUX.2, HunyuanVideo and AuraFlow share FLUX.1's)."""
    known = kind.components.get(kind.denoiser)
    classes = {ancestor.__name__ for ancestor in type(getattr(pipeline, kind.denoiser)).__mro__}
    return known is None or known.name in classes


def check_parts(pipeline: Any, kind: Architecture) -> None:
    """Raise :class:`IterisError` if a component that drawing needs is missing."""
    name = type(pipeline).__name__
    for part, value in pipeline.components.items():
        needed = part in (kind.denoiser, "scheduler", "text_encoder", "tokenizer")
        optional = getattr(type(pipeline), "_optional_components", ())
        if needed and value is None and part not in optional:
            raise BaseError(f"{name} has no {part}. Load the whole pipeline.")


def read_lora(
    pipeline: Any, sites: Mapping[str, nn.Module], path: Path, options: ReadOptions | None = None
) -> Lora:
    """Read any layout that :mod:`..lora_files` knows, scale folded in, float32.

    Raises :class:`LoraFileError` with the file, the key and both shapes if it does not fit.
    """

    def weight(site: str) -> Tensor:
        return plain_weight(site, sites[site], f"{path} is a DoRA, OFT or GLoRA, which")

    base, options = base_of(pipeline, sites), options or ReadOptions()
    own = base.architecture in ARCHITECTURES

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        partial = options.allow_partial
        return tensors if own else by_loader(pipeline, path, base, tensors, allow_partial=partial)

    return read_lora_file(path, base, weight, options, convert)


def load_adapter(pipeline: Any, lora: Lora, name: str) -> None:
    """Load ``lora`` as the adapter ``name``, then the only active one, in place of an earlier one.

    Raises :class:`OutputError` if the pipeline's own loader fails or leaves out a layer. There is
    then no adapter of that name, and the others are as before.
    """
    kind = type(pipeline).__name__
    before = {layer: [*layer.active_adapters] for layer in _adapter_layers(pipeline).values()}
    try:
        pipeline.delete_adapters(name)
        _load(pipeline, lora, name)
        # transformers 5 dropped ``text_model.`` from its names
        loaded = {s for s, layer in _adapter_layers(pipeline).items() if name in layer.lora_A}
        left = [s for s in lora.sites if not {s, s.replace(".text_model.", ".", 1)} & loaded]
        if left:
            raise OutputError(
                f"{kind} loads {len(lora.sites) - len(left)} of the LoRA's {len(lora.sites)} "
                f"changes, and not that of {left[0]}."
            )
        pipeline.set_adapters([name])
    except Exception as error:
        if not before and hasattr(pipeline, "unload_lora_weights"):
            pipeline.unload_lora_weights()
        elif before:
            pipeline.delete_adapters(name)
        for layer, active in before.items():
            layer.set_adapter([other for other in active if other != name])
        if isinstance(error, IterisError):
            raise
        raise OutputError(f"{kind} cannot load the LoRA ({brief(error)}).") from error


def _load(pipeline: Any, lora: Lora, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(by_expert(lora)):
            if part.sites:
                path = Path(folder, f"{number}.safetensors")
                write_lora(part, path, layout="peft", dtype="float32")
                second = {"load_into_transformer_2": True} if number else {}
                pipeline.load_lora_weights(str(path), adapter_name=name, **second)


def _adapter_layers(pipeline: Any) -> dict[str, Any]:
    """peft's layers in all components, by the site's name."""
    return {
        f"{component}.{place}": layer
        for component, model in _components(pipeline)
        for place, layer in peft_layers(model).items()
    }


def single_file_pipeline(path: Path) -> Any:
    """The pipeline's class, detected by diffusers from tensor names and shapes; no tensor is read.
    If no built-in record has it, the class comes from the released model's configuration on the
    hub. Raises :class:`IterisError` if diffusers cannot load a pipeline from the file."""
    import diffusers
    from diffusers.loaders.single_file_utils import (
        DIFFUSERS_DEFAULT_PIPELINE_PATHS,
        infer_diffusers_model_type,
    )
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    shapes, _ = read_header(path)
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model_type = infer_diffusers_model_type(checkpoint)
    for known in ARCHITECTURES:
        if model_type in known.single_files:
            return getattr(diffusers, known.pipeline)
    source: dict[str, str] = DIFFUSERS_DEFAULT_PIPELINE_PATHS[model_type]
    configured: Any = DiffusionPipeline.load_config(source["pretrained_model_name_or_path"])
    pipeline = getattr(diffusers, configured.get("_class_name", ""), None)
    if not hasattr(pipeline, "from_single_file") or not hasattr(pipeline, "load_lora_weights"):
        raise BaseError(
            f"{path} is a checkpoint of type {model_type!r}, from which diffusers loads no "
            "pipeline that supports merging; give a folder with the whole pipeline."
        )
    return pipeline
