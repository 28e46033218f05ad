"""The arguments of a pipeline's denoiser, and the size to request: the rule of
:func:`.default_size` in pixels.

Some have an entry per row, some are random, some depend on the timestep and some on the words. The
module finds out by running the pipeline's first steps a few times, never by name.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from statistics import median_high
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..activations.memory import is_out_of_memory
from ..architectures.sites import unet_levels
from ..calibration import Calibration
from ..errors import BaseError, IterisError, OutOfMemory, SettingsError, brief
from .diffusers_loop import SEVERAL, PipelineLoop
from .recorded import Axes, Call, batched_in, differ, entries, kind, passed
from .sizes import FRAMES, MOST_PIXELS, PICTURE_TOKENS, default_size

_SHORT, _LONG = "a cat", "two cats" + " and a dog" * 16
"""Prompts whose lengths differ in every tokenizer, even with padding to a multiple of 16 or 32
tokens; both fit into CLIP."""

_SAME = 1e-2
"""Two runs with one seed differ by rounding, with two seeds by all of the noise."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a denoiser, by what they depend on."""

    batched: Axes  # those with an entry per row
    lists: frozenset[str]  # of these, those that are not tensors
    noise_args: frozenset[str]
    step_args: frozenset[str]
    prompt_args: frozenset[str]  # none of which is among those of noise or steps
    accepts_batch: bool  # the pipeline takes several prompts
    fixed_shapes: bool  # prompts of any length give equal shapes, so they may share a run
    has_masks: bool  # masks distinguish them, so their rows may not share a forward
    steps: int  # of a denoising
    size: Mapping[str, int]  # that is requested
    noise_size: int  # numbers in a row's noise
    output_example: Any  # the denoiser's output, for its shape


def study(loop: PipelineLoop, calibration: Calibration) -> Arguments:
    """Classify the denoiser's arguments.

    Raises :class:`IterisError` if the pipeline cannot run on prompts and the arguments it was
    given.
    """
    thread, loggers = threading.get_ident(), list(logging.root.manager.loggerDict.values())
    handlers = {h for logger in (logging.root, *loggers) for h in getattr(logger, "handlers", ())}

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    try:
        with torch.no_grad(), ExitStack() as silent:
            # A trial's prompt may be too long, and a trial may fail.
            for handler in handlers | ({logging.lastResort} if logging.lastResort else set()):
                handler.addFilter(of_others)
                silent.callback(handler.removeFilter, of_others)
            return _study(loop, calibration)
    except IterisError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"Memory ran out when {type(loop.pipeline).__name__} ran its first prompt "
                f"({brief(error)}). Lower latent_size or frames, or free memory elsewhere."
            ) from error
        needed = [n for n, p in loop.names.items() if p.default is p.empty and n != "self"]
        also = f" (it asks for {', '.join(needed)})" if needed else ""
        raise BaseError(
            f"{type(loop.pipeline).__name__} cannot be run on prompts alone{also}: "
            f"{brief(error)}. Pass the host the missing arguments, such as image=…"
        ) from error


def _study(loop: PipelineLoop, calibration: Calibration) -> Arguments:
    size, noise_size = pipeline_size(loop, calibration)
    single, double, accepts_batch = _one_and_two(loop, size)
    batched = batched_in(single, double)
    guided = any(
        (single[path].shape[axis] if isinstance(single[path], Tensor) else len(single[path])) == 2
        for path, axis in batched.items()
    )
    if guided and loop.unguided:  # at a scale of 1
        loop.unguided = 0.0
        return _study(loop, calibration)
    long = loop.first_call([_LONG], size)
    first, other = entries(single, batched, 0), entries(double, batched, 0)
    noise_args = frozenset(path for path in batched if differ(first[path], other[path], _SAME))
    moving, steps, output = _steps(loop, calibration, size)
    step_args = frozenset(moving - noise_args)
    if not (noise_args and step_args):
        raise BaseError(
            f"{type(loop.pipeline).__name__} has a denoiser whose noise or timestep cannot be "
            "identified among its arguments; merging on it is not supported."
        )
    of_rows = noise_args | step_args
    if several := sorted(p for p in of_rows if isinstance(first.get(p), (list, tuple))):
        raise BaseError(
            f"{type(loop.pipeline).__name__} gives its denoiser {several[0]} as several tensors a "
            "sample, as of a ControlNet, which a merge does not support; merge on the pipeline "
            "without it."
        )
    still = single.keys() - noise_args - step_args
    calls = [{path: call.get(path) for path in still} for call in (single, long)]
    kinds = [kind(call, batched, masks=False) for call in calls]
    return Arguments(
        # A timestep may be a single number for all rows.
        batched=batched | {p: 0 for p in step_args if getattr(single[p], "ndim", None) == 0},
        lists=frozenset(path for path in batched if not isinstance(single[path], Tensor)),
        noise_args=noise_args,
        step_args=step_args,
        prompt_args=frozenset(path for path in still if differ(single[path], long.get(path))),
        accepts_batch=accepts_batch,
        fixed_shapes=accepts_batch and kinds[0] == kinds[1],
        has_masks=any(passed(first[path]) is not None for path in batched),
        steps=steps,
        size=size,
        noise_size=noise_size,
        output_example=output,
    )


def _one_and_two(loop: PipelineLoop, size: Mapping[str, int]) -> tuple[Call, Call, bool]:
    """Calls with one row and with two, and whether the two may have different prompts. With an
    image to edit, some pipelines take only one prompt, some need an image for each, and some draw
    only one: then two calls are joined if the denoiser's output is that of each alone."""
    single = loop.first_call([_SHORT], size)
    try:
        return single, loop.first_call([_SHORT] * 2, size, seed=1), True
    except Exception as error:
        failed = error
    if any(name in loop.names for name in SEVERAL):
        with suppress(Exception):
            return single, loop.first_call([_SHORT], size, seed=1, pictures=2), False
    if loop.each and not loop.one_each:
        loop.one_each = True
        return _one_and_two(loop, size)
    name, other = next(iter(loop.denoisers)), loop.first_call([_SHORT], size, seed=1)
    double = dict(single)
    for path, value in single.items():
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == 1:
            double[path] = torch.cat([other[path], value])
    apart = torch.cat([loop.denoise(name, call) for call in (other, single)])
    with suppress(Exception):
        if not differ(loop.denoise(name, double), apart, _SAME):
            return single, double, False
    raise failed


def _steps(
    loop: PipelineLoop, calibration: Calibration, size: Mapping[str, int]
) -> tuple[set[str], int, Any]:
    """The arguments that change during denoising, the number of steps, and the denoiser's output.
    The denoiser runs once; after that, ones stand in for its output."""
    outputs: list[Any] = []
    calls: list[tuple[str, Call]] = []

    def on_call(name: str, call: Call, run: Callable[[], Any]) -> Any:
        calls.append((name, call))
        if not outputs:
            outputs.append(run())
        return ones_like(outputs[0], 1)

    def denoise(steps: int) -> None:
        start = [torch.Generator().manual_seed(0)]
        loop.run([_SHORT], on_call, steps=steps, size=size, generators=start)

    denoise(calibration.denoising_steps)
    whole = list(calls)
    if calibration.denoising_steps == 1:  # there is nothing to compare
        denoise(2)
    _, first = calls[0]
    moving = {path for path in first if any(differ(first[path], c.get(path)) for _, c in calls)}
    # Ones change the latents too; the caller separates those that are not drawn.
    steps = 1 + sum(
        who != other or any(differ(a[p], b.get(p)) for p in moving)
        for (who, a), (other, b) in itertools.pairwise(whole)
    )
    return moving, steps, outputs[0]


def ones_like(output: Any, rows: int) -> Any:
    """An output like a denoiser's one-row ``output``, but with ``rows`` rows of ones."""

    def ones(part: Any) -> Any:
        if isinstance(part, list):  # one tensor per row
            return [torch.ones_like(part[0])] * rows  # pyright: ignore
        return part.new_ones(rows, *part.shape[1:]) if isinstance(part, Tensor) else part

    return tree_map(ones, output, is_leaf=lambda part: isinstance(part, list))


_SCALES = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_FRAME_SCALES = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
_PIXEL_STEP = 32
"""Every pipeline accepts sides in pixels that are multiples of this."""


def pipeline_size(loop: PipelineLoop, calibration: Calibration) -> tuple[dict[str, int], int]:
    """Height, width and frames to request from a pipeline, and the count of noise numbers per
    row."""
    size: dict[str, int] = {}

    def known(names: Sequence[str], usual: int) -> int:
        return next((int(s) for s in (getattr(loop.pipeline, n, 0) for n in names) if s), usual)

    if "num_frames" in loop.names:
        seconds, fps = (getattr(loop.pipeline, name, 0) for name in ("min_duration", "fps"))
        size["num_frames"] = calibration.frames or max(FRAMES, math.ceil(seconds * fps))
    elif calibration.frames is not None:
        raise SettingsError(
            f"frames is for videos, and {type(loop.pipeline).__name__} draws none; leave it out."
        )
    if calibration.latent_size is not None:
        side = calibration.latent_size * known(_SCALES, 8)
        size |= {"height": side, "width": side}
    sides, latents = loop.prepared(size)
    if calibration.latent_size is None and len(sides) == 2:
        if latents.ndim < 4:  # packed; for a video, with all frames
            frames = (size.get("num_frames", 1) - 1) // known(_FRAME_SCALES, 1) + 1
            tokens = latents.shape[-2] / frames
        else:
            denoiser = next(iter(loop.denoisers.values()))
            side = denoiser.config.get("patch_size") or denoiser.config.get("all_patch_size") or 1
            if "block_out_channels" in denoiser.config:  # a UNet: latents per token side by block
                middle = getattr(denoiser, "mid_block", None)
                levels = unet_levels((*denoiser.down_blocks, middle, *denoiser.up_blocks))
                side = median_high(levels) if levels else side
            side = int(side[-1] if isinstance(side, (list, tuple)) else side)
            tokens = latents.shape[-2] * latents.shape[-1] / side**2
        # The rule, with pixels in place of latents.
        native = sides["height"], sides["width"]
        patch = max(round(math.sqrt(native[0] * native[1] / tokens)), 1)
        large = tokens > PICTURE_TOKENS or max(native) > MOST_PIXELS
        if large and "height" in loop.names:
            size["height"], size["width"] = default_size(1, patch, native, _PIXEL_STEP)
            _, latents = loop.prepared(size)
    return size, latents.numel() // (1 if latents.ndim == 2 else len(latents))
