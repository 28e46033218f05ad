"""Runs a diffusers pipeline's own ``__call__``, or its blocks if it is modular, until the required
calls are recorded."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import partial, wraps
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.record import Architecture
from ..errors import BaseError
from ..lora_files.experts import second_of
from .recorded import Call, replaced_forward

_EACH = ("image", "lyrics")
SEVERAL = ("num_images_per_prompt", "num_videos_per_prompt")
_PLAIN = {
    "use_kv_cache": False,
    **dict.fromkeys(("stg_scale", "audio_stg_scale"), 0.0),
    **dict.fromkeys(("modality_scale", "audio_modality_scale", "audio_guidance_scale"), 1.0),
}
"""Arguments that make every pipeline call its denoiser once per step, on all tokens."""


OnDenoiserCall = Callable[[str, Call, Callable[[], Any]], Any]
"""``on_call(denoiser, call, run)`` returns the denoiser's output; ``run()`` runs the denoiser."""

_on_call: ContextVar[OnDenoiserCall | None] = ContextVar("on_call", default=None)
# Every greenlet has its own context, so interleaved forwards do not mix.


class StopPipeline(BaseException):
    """Ends a pipeline's loop. Not an Exception, because modular pipelines log those."""


class PipelineLoop:
    """``call`` are the pipeline's arguments besides the prompt, such as an image. ``names`` are all
    its parameters, ``denoisers`` the models it calls. ``unguided`` is the scale that disables
    guidance; with ``one_each`` its image is passed once per prompt. ``each`` are the arguments
    for which some pipelines need a list with an item per prompt. ``empty_prompts``: by default it
    also runs the empty prompt; guidance-distilled models take the scale as an input instead."""

    def __init__(self, pipeline: Any, kind: Architecture, call: Mapping[str, Any]) -> None:
        self.pipeline, self.call = pipeline, call
        parts = {n: getattr(pipeline, n, None) for n in (kind.denoiser, second_of(kind.denoiser))}
        self.denoisers: dict[str, Any] = {
            n: m for n, m in parts.items() if isinstance(m, nn.Module)
        }
        self.modular = ModularFunction(pipeline) if is_modular(pipeline) else None
        self._function = self.modular or inspect.unwrap(type(pipeline).__call__)
        self.names: Mapping[str, inspect.Parameter] = (
            self.modular.names if self.modular else _parameters(type(pipeline))
        )
        for name in call.keys() - self.names.keys():
            raise BaseError(
                f"{type(pipeline).__name__} takes no {name}; leave it out, or load a pipeline that "
                "takes one."
            )
        values = {n: call.get(n, self.names[n].default) for n in _EACH if n in self.names}
        self.each = {name: value for name, value in values.items() if value is not None}
        guided_by_input = any(d.config.get("guidance_embeds") for d in self.denoisers.values())
        self._distilled = guided_by_input and "guidance_scale" in self.names
        other = "true_cfg_scale" in self.names and not self._distilled
        self._scale_name = "true_cfg_scale" if other else "guidance_scale"
        default = getattr(self.names.get(self._scale_name), "default", 0)
        numeric = isinstance(default, (int, float))
        self.empty_prompts = not self._distilled and (not numeric or default > 1)
        self._changed = ExitStack()
        self._copies: dict[str, tuple[Any, Any]] = {}
        self._open = 0
        self.unguided = 1.0
        self.one_each = False

    def run(
        self,
        prompts: Sequence[str],
        on_call: OnDenoiserCall,
        *,
        steps: int,
        size: Mapping[str, int],
        generators: Sequence[torch.Generator],
        guidance: float = 1.0,
        pictures: int = 1,
    ) -> None:
        """Run the loop on ``prompts`` to its end, or until ``on_call`` raises
        :class:`StopPipeline`."""
        arguments: dict[str, Any] = {
            "prompt": list(prompts),
            "num_inference_steps": steps,
            "generator": list(generators),
            "output_type": "latent",
            **dict.fromkeys(SEVERAL, pictures),
            **_PLAIN,
            **size,
            **self.call,
            **{n: [value] * len(prompts) for n, value in self.each.items() if self.one_each},
        }
        for name in ("prompt", "generator") if self.modular else ():  # some blocks take no list
            if len(arguments[name]) == 1:
                (arguments[name],) = arguments[name]
        name = self._scale_name
        if self._distilled or name not in self.names:
            arguments |= {name: guidance} if guidance > 1 else {}
        else:
            arguments[name] = guidance - 1 + self.unguided
            if name == "true_cfg_scale" and guidance > 1:  # no effect without a negative prompt
                arguments["negative_prompt"] = [""] * len(prompts)
        known = {name: value for name, value in arguments.items() if name in self.names}
        token = _on_call.set(on_call)
        try:
            with self._ready(), suppress(StopPipeline):
                self._function(self.pipeline, **known)
        finally:
            _on_call.reset(token)

    @contextmanager
    def _ready(self) -> Generator[None]:
        """Context, restored when the last of several runs ends, which may wait for each other."""
        if not self._open:
            changes: list[tuple[Any, str, Any]] = [
                (bar, "_progress_bar_config", {"disable": True})
                for bar in progress_bars(self.pipeline)
            ]
            for name, part in self.pipeline.components.items():
                if name == "guider" or name.endswith("scheduler"):
                    if name not in self._copies or self._copies[name][0] is not part:
                        self._copies[name] = part, copy.deepcopy(part)
                    changes.append((self.pipeline, name, self._copies[name][1]))
            for where, name, value in changes:
                self._changed.callback(setattr, where, name, getattr(where, name, {}))
                setattr(where, name, value)
            for name, denoiser in self.denoisers.items():
                through = partial(_recorded, name, denoiser)
                self._changed.enter_context(replaced_forward(denoiser, through))
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._changed.close()
                self.free()

    def denoise(self, name: str, call: Call) -> Tensor:
        """The output of a denoiser, rows first."""
        arguments: dict[str, Any] = {"return_dict": False}
        for path, value in call.items():
            argument, dot, key = path.partition(".")
            if dot:
                arguments.setdefault(argument, {})[key] = value
            elif argument != "return_dict":
                arguments[argument] = value
        output = self.denoisers[name](**arguments)
        output = output if isinstance(output, Tensor) else output[0]
        return torch.stack(output) if isinstance(output, list) else output  # pyright: ignore

    def free(self) -> None:
        """Move models off the device that the pipeline offloads whole; one called alone stays."""
        if getattr(self.pipeline, "_all_hooks", None):
            self.pipeline.maybe_free_model_hooks()

    def first_call(
        self, prompts: Sequence[str], size: Mapping[str, int], seed: int = 0, pictures: int = 1
    ) -> Call:
        """The arguments of the denoiser's first call; the call itself does not run."""
        calls: list[Call] = []

        def on_call(name: str, call: Call, run: Callable[[], Any]) -> Any:
            calls.append(call)
            raise StopPipeline

        generators = [torch.Generator().manual_seed(seed) for _ in range(pictures * len(prompts))]
        self.run(prompts, on_call, steps=2, size=size, generators=generators, pictures=pictures)
        return calls[0]

    def prepared(self, size: Mapping[str, int]) -> tuple[dict[str, int], Tensor]:
        """The height and width in pixels that the pipeline passes to its ``prepare_latents`` for a
        request of ``size``, and the latents from there. Raises :class:`BaseError` without any."""
        kept = list[tuple[Mapping[str, Any], Any]]()
        prepare = getattr(self.pipeline, "prepare_latents", None)
        if self.modular is not None:
            self.first_call(["a cat"], size)
            kept.append(self.modular.prepared(self.pipeline))
        elif prepare is not None:
            signature = inspect.signature(prepare)

            def keep(*args: Any, **kwargs: Any) -> Any:
                latents = prepare(*args, **kwargs)
                kept.append((signature.bind(*args, **kwargs).arguments, latents))
                return latents

            self.pipeline.__dict__["prepare_latents"] = keep
            try:
                self.first_call(["a cat"], size)
            finally:
                del self.pipeline.__dict__["prepare_latents"]
        arguments, latents = kept[0] if kept else ({}, None)
        if latents is None:
            raise BaseError(
                f"{type(self.pipeline).__name__} makes its latents in an unsupported way."
            )
        sides = {name: side for name in ("height", "width") if (side := arguments.get(name))}
        return sides, latents if isinstance(latents, Tensor) else latents[0]


def _recorded(name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward`` of ``module`` that goes through the ``on_call`` of the run that calls it. Its
    call has no ``self``; what is in ``**kwargs`` is listed like the other arguments."""
    signature = inspect.signature(type(module).forward)

    @wraps(forward)  # pipelines inspect its signature
    def through(*args: Any, **kwargs: Any) -> Any:
        on_call = _on_call.get()
        if on_call is None:
            return forward(*args, **kwargs)
        call: Call = {}
        for argument, value in list(signature.bind(module, *args, **kwargs).arguments.items())[1:]:
            if argument == "kwargs":
                call |= value
            elif isinstance(value, dict) and value:
                call |= {f"{argument}.{key}": part for key, part in value.items()}  # pyright: ignore
            else:
                call[argument] = value
        return on_call(name, call, lambda: forward(*args, **kwargs))

    return through


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """The parameters of a pipeline's ``__call__``; where it passes others on, its parent's too."""
    parameters: dict[str, inspect.Parameter] = {}
    for owner in kind.__mro__:
        if "__call__" in vars(owner):
            declared = inspect.signature(inspect.unwrap(vars(owner)["__call__"])).parameters
            parameters = {**declared, **parameters}
            if all(parameter.kind is not Parameter.VAR_KEYWORD for parameter in declared.values()):
                break
    return parameters


def is_modular(pipeline: Any) -> bool:
    """True for a pipeline made of blocks."""
    return hasattr(pipeline, "_blocks")


class ModularFunction:
    """The blocks of a ``ModularPipeline`` as one function of keyword arguments.

    ``names`` are these arguments: the inputs of the blocks, and ``guidance_scale`` if a guider has
    it. A call sets the scale on the guider; the caller restores it. Blocks run without gradients,
    up to the end of the denoising; a block that only rewrites the prompt is skipped.
    """

    def __init__(self, pipeline: Any) -> None:
        self._blocks = pipeline._blocks
        self._inputs = [block_input for block_input in self._blocks.inputs if block_input.name]
        defaults = {s.name: Parameter.empty if s.required else s.default for s in self._inputs}
        scale = getattr(getattr(pipeline, "guider", None), "guidance_scale", None)
        self._guided = scale is not None and "guidance_scale" not in defaults
        if self._guided:
            defaults["guidance_scale"] = scale
        self.names = {
            name: Parameter(name, Parameter.KEYWORD_ONLY, default=default)
            for name, default in defaults.items()
        }
        self._state: Any = None

    def __call__(self, pipeline: Any, **arguments: Any) -> None:
        from diffusers.modular_pipelines.modular_pipeline import (
            PipelineState,
            SequentialPipelineBlocks,
        )

        if self._guided:
            pipeline.guider.guidance_scale = arguments.pop("guidance_scale")
        self._state = PipelineState()
        for block_input in self._inputs:
            value = arguments.get(block_input.name, block_input.default)
            self._state.set(block_input.name, value, block_input.kwargs_type)
        blocks = [self._blocks]
        if isinstance(self._blocks, SequentialPipelineBlocks):
            parts = self._blocks.sub_blocks.values()
            blocks = [part for part in parts if part.intermediate_output_names != ["prompt"]]
        for block in blocks:
            block(pipeline, self._state)
            if any(_loops(block)):
                return

    def prepared(self, pipeline: Any) -> tuple[dict[str, Any], Any]:
        """The sides in pixels and the latents of the last call; None if no block makes any."""
        state = self._state
        sides = {
            n: state.get(n) or getattr(pipeline, f"default_{n}", 0) for n in ("height", "width")
        }
        return sides, state.get("latents")


def progress_bars(pipeline: Any) -> Iterator[Any]:
    """The objects that show a progress bar: the pipeline, or each of its loops."""
    yield from _loops(pipeline._blocks) if is_modular(pipeline) else [pipeline]


def _loops(block: Any) -> Iterator[Any]:
    if hasattr(block, "progress_bar"):
        yield block
    for part in (getattr(block, "sub_blocks", None) or {}).values():
        yield from _loops(part)
