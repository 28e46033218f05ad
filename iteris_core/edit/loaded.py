"""Merges adapters that are already loaded into a new adapter beside them.

``add_merged_adapter`` is for a ``PeftModel``, ``merge_loaded`` for a diffusers pipeline.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.sites import plain_weight, weight_shape
from ..concepts import Concept, words_in
from ..errors import ConceptError, LoraFileError, SettingsError
from ..hosts.diffusers import DiffusersHost
from ..hosts.diffusers_lora import base_of, components_of, peft_layers
from ..hosts.protocol import Host
from ..hosts.transformers import TransformersHost
from ..lora import Lora, LowRank
from ..lora_files.factors import lora_config
from ..lora_files.formulas import rebuild
from ..merge import MergeResult, merge_loras
from ..passes.report import MergeReport


def add_merged_adapter(
    model: Any,
    names: Sequence[str],
    inputs: Mapping[str, Any],
    adapter_name: str = "merged",
    *,
    weights: Mapping[str, float] | None = None,
    heads: str | None = None,
    generate: Mapping[str, Any] | None = None,
    **choices: Any,
) -> MergeReport:
    """Merge adapters of a ``PeftModel`` into a new one beside them.

    Each adapter counts with its full effect in the model: its layers' scales, rank and alpha
    patterns, rslora and DoRA. The base, the other adapters and the active adapter are always left
    unchanged. DoRA layers make the merged adapter large; ``settings={"rank": 64}`` limits it.

    :param model: the ``PeftModel``.
    :param names: the adapters to merge.
    :param adapter_name: the name of the new one.
    :param inputs: for each adapter its inputs, as in :class:`.Concept`: batches of keyword
        arguments of the model, or a callable that returns them.
    :param weights: how much each adapter counts; 1 if not given.
    :param heads: the adapter whose ``modules_to_save`` are copied to the merged one; every task
        keeps its own head.
    :param generate: as for :class:`.TransformersHost`.
    :param choices: further arguments of :func:`.merge_loras`.
    :raises IterisError: like :func:`.merge_loras`; also for an unsupported adapter, an unknown
        name, or a name already in use.
    """
    model_of: nn.Module = model.base_model.model
    _check_names(names, model.peft_config, inputs)
    if adapter_name in model.peft_config:
        raise SettingsError(f"There is an adapter {adapter_name!r} already; choose another name.")
    if heads is not None:
        _check_names([heads], model.peft_config)
    with without_adapters([model_of]) as of_base:
        host = TransformersHost(model_of, generate=generate)
        loras = _loaded(host, of_base, names)
        concepts = [
            Concept(loras[name], trigger=name, weight=(weights or {}).get(name, 1.0),
                    inputs=inputs[name])
            for name in names
        ]  # fmt: skip
        result = merge_loras(host, concepts, **choices)
    changes = {site.removeprefix("model."): c for site, c in result.lora.sites.items()}
    _add(model, adapter_name, changes, heads)
    return result.report


def merge_loaded(
    pipeline: Any,
    words: Mapping[str, str | Sequence[str] | Mapping[str, Any]],
    adapter_name: str = "merged",
    *,
    call: Mapping[str, Any] | None = None,
    **choices: Any,
) -> MergeResult:
    """Merge the active adapters of a diffusers pipeline, at the weights from ``set_adapters``, into
    a new one, which is then the only active one. Called again, it merges the same adapters and
    replaces the earlier merge.

    :param words: for each active adapter its trigger words ("sks cat"), a list of prompts that
        invoke it, or fields of :class:`.Concept` by name, such as ``{"trigger": "sks", "weight":
        2}``.
    :param adapter_name: the name of the new adapter.
    :param call: further arguments of the pipeline, as for :class:`.DiffusersHost`.
    :param choices: further arguments of :func:`.merge_loras`.
    :raises IterisError: like :func:`.merge_loras`; also for an adapter that is unsupported or has
        no words. All adapters are then as before. If the pipeline cannot load the merge, the error
        says in which file it is.
    """
    if adapter_name in words:
        raise SettingsError(f"{adapter_name!r} is an adapter to merge; choose another name.")
    names: list[str] = list(pipeline.get_active_adapters())
    if names == [adapter_name]:  # merged before
        by_component = pipeline.get_list_adapters().values()
        names = [name for name in words if any(name in listed for listed in by_component)]
    _check_names(list(words), names, what="active adapter")
    _check_names(names, names, words)
    fields: dict[str, Mapping[str, Any]] = {}
    for name in names:
        of_adapter = words[name]
        if isinstance(of_adapter, Mapping):
            fields[name] = {"trigger": name, **of_adapter}
        elif isinstance(of_adapter, str):
            fields[name] = words_in([of_adapter])
        else:
            fields[name] = {"trigger": name, "prompts": list(of_adapter)}
    with without_adapters([*components_of(pipeline).values()]) as of_base:
        host = DiffusersHost(pipeline, **(call or {}))
        loras, base = _loaded(host, of_base, names), base_of(pipeline, host.sites())
        concepts = [Concept(replace(loras[name], base=base), **fields[name]) for name in names]
        result = merge_loras(host, concepts, **choices)
    result.load_into(pipeline, adapter_name)
    return result


def _check_names(
    names: Iterable[str],
    known: Collection[str],
    inputs: Collection[str] | None = None,
    what: str = "adapter",
) -> None:
    """Raise :class:`IterisError` for a name that is not ``known``, or not in ``inputs``."""
    names = list(names)
    if not names or len(set(names)) < len(names):
        raise SettingsError(f"Name each {what} to merge once; they are {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise SettingsError(f"There is no {what} {name!r}; known are {', '.join(known)}.")
        if inputs is not None and name not in inputs:
            raise ConceptError(f"Adapter {name!r}: give its words or inputs, {name!r}: ….")


def _loaded(host: Host, of_base: Mapping[nn.Module, Any], names: Sequence[str]) -> dict[str, Lora]:
    """The adapters as LoRAs for ``host``; raises :class:`LoraFileError` if one changes nothing."""
    changes: dict[str, dict[str, LowRank]] = {name: {} for name in names}
    places = {module: site for site, module in host.sites().items()}
    for module, layer in of_base.items():
        if not hasattr(layer, "get_delta_weight") and not hasattr(layer, "lora_A"):
            continue  # a separate whole module, such as a head
        for name in names:
            change = change_of(layer, places.get(module, type(layer).__name__), name)
            if change is not None:
                changes[name][places[module]] = change
    for name, sites in changes.items():
        if not sites:
            raise LoraFileError(f"Adapter {name!r} changes no layer; there is nothing to merge.")
    return {name: Lora(sites, name, source=name) for name, sites in changes.items()}


@contextmanager
def without_adapters(models: Sequence[nn.Module]) -> Generator[Mapping[nn.Module, Any]]:
    """Context in which ``models`` are as they were before peft. Yields base layer → peft layer."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    places: list[tuple[nn.Module, str, Any, nn.Module]] = []
    of_base: dict[nn.Module, Any] = {}
    for model in models:
        layers = peft_layers(model)
        wrappers = (AuxiliaryTrainingWrapper, *map(type, layers.values()))
        for name, module in model.named_modules():
            if isinstance(module, wrappers):
                layer: Any = module
                plain: Any = layer.get_base_layer() if name in layers else layer.original_module
                parent, _, leaf = name.rpartition(".")
                places.append((model.get_submodule(parent), leaf, layer, plain))
                of_base[plain] = layer
    try:
        for owner, leaf, _, plain in places:
            setattr(owner, leaf, plain)
        yield of_base
    finally:
        for owner, leaf, layer, _ in places:
            setattr(owner, leaf, layer)


def change_of(layer: Any, place: str, name: str) -> LowRank | None:
    """The change of the adapter ``name`` at ``layer``, at its current strength; None if it changes
    nothing.

    float32 and exact; a DoRA has the rank of the weight. Raises :class:`LoraFileError`, naming
    ``place``, for anything but a LoRA of a linear layer or a convolution.
    """
    known = getattr(layer, "lora_A", {})
    if name not in known or hasattr(layer, "parameter_name"):
        if any(name in getattr(layer, kind) for kind in layer.adapter_layer_names):
            raise LoraFileError(
                f"Adapter {name!r} changes {place} as a {type(layer).__name__}, not as a LoRA of a "
                "linear layer or a convolution; it cannot be merged."
            )
        return None
    up, down = layer.lora_B[name], layer.lora_A[name]
    variant = getattr(layer, "lora_variant", {}).get(name)
    dora = variant is None or type(variant).__name__.startswith("Dora")
    if not dora or up.bias is not None:
        what = type(variant).__name__ if not dora else "lora_bias"
        raise LoraFileError(
            f"Adapter {name!r} has an unsupported type at {place} ({what}); only LoRA and DoRA "
            "without biases can be merged."
        )
    stored = {"up": up, "down": down}
    if name in layer.lora_magnitude_vector:
        stored["output_magnitude"] = layer.lora_magnitude_vector[name]
    parts = {n: part.weight.detach().to("cpu", torch.float32) for n, part in stored.items()}
    base, scale = layer.get_base_layer(), float(layer.scaling[name])

    def weight() -> Tensor:
        return plain_weight(place, base, "A DoRA").flatten(1)

    change = rebuild(parts, weight_shape(base), scale, place, weight)
    change = LowRank.whole(change) if isinstance(change, Tensor) else change
    change = replace(change, kernel=tuple(down.weight.shape[2:]) or None)
    return change if bool(change.up.any()) and bool(change.down.any()) else None


def _add(model: Any, name: str, changes: Mapping[str, LowRank], heads: str | None) -> None:
    """Add an adapter with ``changes``, by layer name; on failure everything is restored."""
    from peft import LoraConfig

    base: nn.Module = model.base_model.model
    before = peft_layers(base)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = model.peft_config[heads].modules_to_save if heads is not None else None
    config = LoraConfig(
        **lora_config({n: (c.rank, c.rank) for n, c in changes.items()}, "^"),
        modules_to_save=None if modules is None else list(modules),
    )
    try:
        model.add_adapter(name, config)
        with torch.no_grad():
            for place, change in changes.items():
                layer: Any = base.get_submodule(place)
                down, up = layer.lora_A[name], layer.lora_B[name]
                down.weight.copy_(change.down.reshape(down.weight.shape))
                up.weight.copy_(change.up.reshape(up.weight.shape))
        for module in base.modules() if heads is not None else ():
            copies: Any = getattr(module, "modules_to_save", {})
            if heads in copies:
                copies[name].load_state_dict(copies[heads].state_dict())
    except BaseException:
        model.peft_config.pop(name, None)
        for place, layer in peft_layers(base).items():
            layer.delete_adapter(name)
            if place not in before:
                parent, _, leaf = place.rpartition(".")
                setattr(base.get_submodule(parent), leaf, layer.get_base_layer())
        raise
    finally:
        for parameter, on in trained:
            parameter.requires_grad_(on)
