"""Keeps the words of evaluation prompts out of every calibration row."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from captions import words_of
from torch import nn

from iteris_core import Concept, Lora, MergeResult, calibration_prompts, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost

from .world import World


def merged(
    world: World,
    concepts: Sequence[Concept],
    method: str = "iteris",
    *,
    calibration: Mapping[str, Any] | None = None,
    **options: Any,
) -> Lora:
    """The LoRA of :func:`result_of`."""
    return result_of(world, concepts, method, calibration=calibration, **options).lora


def result_of(
    world: World,
    concepts: Sequence[Concept],
    method: str = "iteris",
    *,
    calibration: Mapping[str, Any] | None = None,
    **options: Any,
) -> MergeResult:
    """The merge by fields of the calibration beside the world's own; no row has a word of the
    world's evaluation prompts. ``options`` are further ones of :func:`merge_loras`."""
    fields = {"seed": 0, **world.half, **(calibration or {})}
    with held_out(world.host, world.words):
        return merge_loras(world.host, concepts, method, calibration=fields, **options)


@contextmanager
def held_out(host: DiffusersHost, words: Set[str]) -> Generator[None]:
    """Context in which contexts and generic prompts of ``host`` have none of ``words``.

    Templates are the caller's. Raises AssertionError if any text that a text encoder reads has one.
    """
    captions = tuple(c for c in calibration_prompts.CAPTIONS if not words & words_of(c))
    vocabulary = [word for word in host._vocabulary if word not in words]
    with ExitStack() as stack:
        stack.enter_context(patch.object(calibration_prompts, "CAPTIONS", captions))
        stack.enter_context(patch.object(host, "_vocabulary", vocabulary))
        for name, part in host.pipeline.components.items():
            if name.startswith("text_encoder") and isinstance(part, nn.Module):
                tokenizer = host.pipeline.components[name.replace("text_encoder", "tokenizer")]
                check = _checked(tokenizer, words)
                stack.callback(part.register_forward_pre_hook(check, with_kwargs=True).remove)
        yield


def _checked(tokenizer: Any, words: Set[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for text in tokenizer.batch_decode(args[0] if args else kwargs["input_ids"]):
            found = words & words_of(text)
            assert not found, f"a calibration row has {sorted(found)}: {text!r}"

    return hook
