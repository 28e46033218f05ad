"""A diffusers pipeline: its class, sites and architecture, and LoRA files for it.

Names that only the pipeline's own loader knows go through its converter, which may silently drop
keys. So every row of every input tensor must appear unchanged in the output. Alphas are folded in
first, because converters treat them differently.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import ARCHITECTURES, Architecture, architecture_of_sites
from ..architectures.record import CONNECTORS
from ..architectures.sites import named_sites, plain_weight, weight_shape
from ..errors import BaseError, IterisError, LoraFileError, ModelStateError, OutputError, brief
from ..lora import Lora
from ..lora_files import BaseModel, ReadOptions, base_model, read_header, read_lora_file, write_lora
from ..lora_files.aliases import file_names
from ..lora_files.experts import by_expert
from ..lora_files.tensors import modules_of, split_key
from .protocol import check_model

OF_TEXT = ("text_encoder", *CONNECTORS)
"""Name prefixes of the components that run before the denoiser, on text only."""

COMPONENTS = (
    *("unet", "transformer", "transformer_2"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", *CONNECTORS),
)


def pipeline_sites(pipeline: Any) -> dict[str, nn.Module]:
    """Layers of all components that a LoRA may change. Raises :class:`ModelStateError` if one is
    compiled or has adapters loaded."""
    sites: dict[str, nn.Module] = {}
    for name, model in components_of(pipeline).items():
        check_model(model)
        sites |= named_sites(name, model)
    return sites


def components_of(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's models that LoRAs may change, by name."""
    models = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    return {name: model for name, model in models.items() if isinstance(model, nn.Module)}


def base_of(pipeline: Any, sites: Mapping[str, nn.Module]) -> BaseModel:
    """The base model of a pipeline: a built-in one, or one with the names of the pipeline's own
    LoRA loader. Raises :class:`IterisError` for a pipeline without a denoiser or a loader."""
    shapes = {site: weight_shape(module) for site, module in sites.items()}
    kind = architecture_of_sites(shapes)
    # Other classes, such as FLUX.2, HunyuanVideo and AuraFlow, have FLUX.1's names of sites.
    if kind is not None and (known := kind.components.get(kind.denoiser)) is not None:
        ancestors = type(getattr(pipeline, kind.denoiser)).__mro__
        if known.name in {ancestor.__name__ for ancestor in ancestors}:
            return base_model(kind, shapes)
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
    """Components for which the pipeline's loader reads changes; of text encoders, only CLIP."""
    named: Sequence[str] = getattr(type(pipeline), "_lora_loadable_modules", ())
    return [
        name
        for name in named
        if isinstance(part := getattr(pipeline, name, None), nn.Module)
        and (not name.startswith("text_encoder") or type(part).__name__.startswith("CLIPText"))
    ]


def read_lora(
    pipeline: Any, sites: Mapping[str, nn.Module], path: Path, options: ReadOptions | None = None
) -> Lora:
    """Read any layout that :mod:`..lora_files` knows; raises :class:`LoraFileError` otherwise."""

    def weight(site: str) -> Tensor:
        return plain_weight(site, sites[site], f"{path} is a DoRA, which")

    base, options = base_of(pipeline, sites), options or ReadOptions()
    convert = partial(by_loader, pipeline, path, base, allow_partial=options.allow_partial)
    built_in = base.architecture in ARCHITECTURES
    return read_lora_file(path, base, weight, options, dict if built_in else convert)


def load_adapter(pipeline: Any, lora: Lora, name: str) -> None:
    """Load ``lora`` as the adapter ``name``, then the only active one, in place of an earlier one.

    Raises :class:`OutputError` if the pipeline's own loader fails or leaves out a layer. There is
    then no adapter of that name, and the others are as before.
    """

    def adapters() -> dict[str, Any]:
        return {
            f"{component}.{place}": layer
            for component, model in components_of(pipeline).items()
            for place, layer in peft_layers(model).items()
        }

    kind = type(pipeline).__name__
    before = {layer: [*layer.active_adapters] for layer in adapters().values()}
    try:
        pipeline.delete_adapters(name)
        with tempfile.TemporaryDirectory() as folder:
            for number, part in enumerate(by_expert(lora)):
                if part.sites:
                    path = Path(folder, f"{number}.safetensors")
                    write_lora(part, path, layout="peft", dtype="float32")
                    second = {"load_into_transformer_2": True} if number else {}
                    pipeline.load_lora_weights(str(path), adapter_name=name, **second)
        # transformers 5 dropped ``text_model.`` from its names
        loaded = {site for site, layer in adapters().items() if name in layer.lora_A}
        left = [s for s in lora.sites if not {s, s.replace(".text_model.", ".", 1)} & loaded]
        if left:
            raise OutputError(
                f"{kind} loads {len(lora.sites) - len(left)} of the LoRA's {len(lora.sites)} "
                f"changes, and not that of {left[0]}."
            )
        pipeline.set_adapters([name])
    except Exception as error:
        if before:
            pipeline.delete_adapters(name)
        elif hasattr(pipeline, "unload_lora_weights"):
            pipeline.unload_lora_weights()
        for layer, active in before.items():
            layer.set_adapter([other for other in active if other != name])
        if isinstance(error, IterisError):
            raise
        raise OutputError(f"{kind} cannot load the LoRA ({brief(error)}).") from error


def peft_layers(model: nn.Module) -> dict[str, Any]:
    """All peft layers of a model; raises :class:`ModelStateError` if an adapter is merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in layers.items():
        if layer.merged:
            raise ModelStateError(
                f"Adapters are merged into the weight of {name}; remove them first "
                "(model.unmerge_adapter(), pipeline.unfuse_lora())."
            )
    return layers


def single_file_pipeline(path: Path) -> Any:
    """The pipeline's class, detected by diffusers from tensor names and shapes; no tensor is read.
    Raises :class:`BaseError` if no built-in record has it."""
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    shapes, _ = read_header(path)
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model_type = infer_diffusers_model_type(checkpoint)
    for known in ARCHITECTURES:
        if model_type in known.single_files:
            return getattr(diffusers, known.pipeline)
    raise BaseError(
        f"{path} is a checkpoint of type {model_type!r}, from which no whole pipeline can be made; "
        "give a folder with the whole pipeline."
    )


Tensors = Mapping[str, Tensor]


def by_loader(
    pipeline: Any, path: Path, base: BaseModel, tensors: Tensors, *, allow_partial: bool
) -> dict[str, Tensor]:
    """``tensors`` of the file ``path``, renamed to names that ``base`` has.

    If it has all of them, they stay. Otherwise the pipeline's loader converts them, if necessary
    under another spelling of the same names. Raises :class:`LoraFileError` that names the lost
    keys; with ``allow_partial`` they stay, under names that say so.
    """

    def unknown(tensors: Tensors) -> list[str]:
        splits = {key: split_key(key, base.aliases) for key in tensors}
        return [key for key, split in splits.items() if not split or split[0] not in base.aliases]

    strange, name = unknown(tensors), type(pipeline).__name__
    if not strange:
        return dict(tensors)
    tried: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    why = ""
    for spelled in _spellings(tensors):
        try:
            converted, lost = _convert(pipeline, spelled)
        except Exception as failure:  # converters raise many types of exception
            why = why or f" ({brief(failure)})"
            continue
        lost |= {key: converted.pop(key) for key in unknown(converted)}
        if not lost:
            return converted
        tried.append((converted, lost))
    best, lost = min(tried, key=lambda attempt: len(attempt[1]), default=(dict(tensors), {}))
    if allow_partial:
        return best | {f"{key} (left out by diffusers' loader)": t for key, t in lost.items()}
    if 0 < len(lost) < len(tensors):
        raise LoraFileError(
            f"{path}: diffusers' loader of {name} would leave out {len(lost)} of {len(tensors)} "
            f"tensors, such as {', '.join([*lost][:3])}. To go on without them, use "
            "option allow_partial."
        )
    raise LoraFileError(
        f"{path}: {strange[0]} {tuple(tensors[strange[0]].shape)} matches no module of the base "
        f"model, and diffusers' loader of {name} does not convert the file{why}; was this LoRA "
        "made for another base model?"
    )


def _spellings(tensors: Tensors) -> Iterator[dict[str, Tensor]]:
    """The tensors with every alpha folded in, then equal to its rank: as they are, without alphas,
    and with ComfyUI's and kohya's prefixes."""
    folded = dict(tensors)
    for keys in modules_of(tensors).values():
        if {"alpha", "down", "up"} <= keys.keys():
            alpha, rank = tensors[keys["alpha"]], tensors[keys["down"]].shape[0]
            scale = float(alpha.flatten()[0]) / max(rank, 1)
            folded[keys["up"]] = tensors[keys["up"]].float() * scale
            folded[keys["alpha"]] = torch.full_like(alpha, rank, dtype=torch.float32)
    bare = {key: t for key, t in folded.items() if not key.endswith(".alpha")}
    ours: dict[str, Tensor] = {}
    kohya: dict[str, Tensor] = {}
    for key, tensor in bare.items():
        name = re.sub(r"^(base_model\.model\.)?(diffusion_model\.)?(transformer\.)?", "", key)
        module, part = split_key(name, ()) or (name, "")
        leaf = {"down": ".lora_down.weight", "up": ".lora_up.weight"}.get(part, f".{part}")
        ours[f"diffusion_model.{name}"] = tensor
        kohya[f"lora_unet_{module.replace('.', '_')}{leaf}"] = tensor
    yield from (folded, bare, ours, kohya)


def _convert(
    pipeline: Any, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The loader's result for ``tensors``, including alphas that it returns separately; and the
    tensors that it lost, at least in part."""
    unet = getattr(pipeline, "unet", None)
    options = {} if unet is None else {"unet_config": unet.config}
    loaded: Any = type(pipeline).lora_state_dict(dict(tensors), **options)  # which it may empty
    state, alphas = loaded if isinstance(loaded, tuple) else (loaded, None)
    converted: dict[str, Tensor] = {
        **state,
        **{key: torch.tensor(float(alpha)) for key, alpha in (alphas or {}).items()},
    }

    def fingerprints(tensor: Tensor) -> Tensor:
        """(rows,) int64, equal for equal rows; none for zero rows, which a converter may drop."""
        rows = tensor.float().flatten(1) if tensor.ndim > 1 else tensor.float().reshape(-1, 1)
        generator = torch.Generator().manual_seed(rows.shape[1])
        factors = torch.randint(2**62, rows.shape[1:], generator=generator)
        sums = (rows.contiguous().view(torch.int32) * factors).sum(dim=1)  # modulo 2^64
        return sums[(rows != 0).any(dim=1)]

    none = torch.empty(0, dtype=torch.int64)
    there = torch.cat([none, *map(fingerprints, converted.values())])
    lost = {k: t for k, t in tensors.items() if not torch.isin(fingerprints(t), there).all()}
    return converted, {k: t for k, t in lost.items() if not k.endswith(".alpha")}
