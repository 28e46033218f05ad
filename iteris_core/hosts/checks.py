"""What a model must be like before anything is merged on it."""

from __future__ import annotations

from torch import nn

from ..errors import IterisError


def check_model(model: nn.Module) -> None:
    """Raise :class:`IterisError` where peft's layers stand in place of the model's own."""
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise IterisError(
            f"{type(model).__name__} has adapters loaded; a merge needs the base model as it is. "
            "Take them off (pipeline.unload_lora_weights() or model.unload()), or load it anew."
        )


def check_eval(model: nn.Module) -> None:
    """Raise :class:`IterisError` where dropout would make every forward another."""
    if model.training:
        raise IterisError(
            f"{type(model).__name__} is in training mode, in which dropout makes what it gives "
            "random; call its eval() first."
        )
