"""A modular diffusers pipeline, made callable like any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import Parameter
from typing import Any

from torch import Tensor


class ModularFunction:
    """The blocks of a ``ModularPipeline`` as one function of keyword arguments.

    ``names`` are these arguments: the inputs of the blocks, and ``guidance_scale`` if a guider has
    it. A call sets the scale on the guider; the caller restores it. Blocks run without gradients,
    up to the end of the denoising; a block that only rewrites the prompt is skipped.
    """

    def __init__(self, pipeline: Any) -> None:
        self._blocks = pipeline._blocks
        inputs = [some for some in self._blocks.inputs if some.name]
        self.names = {
            some.name: _parameter(some.name, Parameter.empty if some.required else some.default)
            for some in inputs
        }
        scale = getattr(getattr(pipeline, "guider", None), "guidance_scale", None)
        self._guided = scale is not None and "guidance_scale" not in self.names
        if self._guided:
            self.names["guidance_scale"] = _parameter("guidance_scale", scale)
        self._state: Any = None

    def __call__(self, pipeline: Any, **arguments: Any) -> None:
        from diffusers.modular_pipelines.modular_pipeline import PipelineState

        if self._guided:
            pipeline.guider.guidance_scale = arguments.pop("guidance_scale")
        self._state = PipelineState()
        for some in self._blocks.inputs:
            value = arguments.get(some.name, some.default)
            if some.name is not None:
                self._state.set(some.name, value, some.kwargs_type)
        for block in self._in_order():
            block(pipeline, self._state)
            if any(_loops(block)):
                return

    def _in_order(self) -> Sequence[Any]:
        from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks

        if not isinstance(self._blocks, SequentialPipelineBlocks):
            return [self._blocks]
        blocks = self._blocks.sub_blocks.values()
        return [block for block in blocks if block.intermediate_output_names != ["prompt"]]

    def prepared(self, pipeline: Any) -> tuple[dict[str, int], Tensor | None]:
        """The sides in pixels and the latents of the last call; None if no block makes any."""
        sides = {
            name: self._state.get(name) or getattr(pipeline, f"default_{name}", None)
            for name in ("height", "width")
        }
        return {name: side for name, side in sides.items() if side}, self._state.get("latents")


def _parameter(name: str, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default)


def is_modular(pipeline: Any) -> bool:
    """True for a pipeline made of blocks."""
    return hasattr(pipeline, "_blocks")


def progress_bars(pipeline: Any) -> Iterator[Any]:
    """The objects that show a progress bar: the pipeline, or each of its loops."""
    yield from _loops(pipeline._blocks) if is_modular(pipeline) else [pipeline]


def _loops(block: Any) -> Iterator[Any]:
    if hasattr(block, "progress_bar"):
        yield block
    inner: Mapping[str, Any] = getattr(block, "sub_blocks", None) or {}
    for some in inner.values():
        yield from _loops(some)
