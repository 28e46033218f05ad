"""The arguments of a pipeline's denoiser, and the size to request: the rule of
:func:`.default_size` in pixels.

Some have an entry per row, some are random, some depend on the timestep and some on the words. The
module finds out by running the pipeline's first steps a few times, never by name.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations.memory import is_out_of_memory
from ..concepts import Calibration
from ..errors import BaseError, IterisError, OutOfMemory, SettingsError, brief
from .diffusers_loop import SEVERAL, PipelineLoop
from .recorded import Axes, Call, batched_in, differ, entries, kind, passed, rows_in
from .rows import FRAMES, MOST_PIXELS, PICTURE_TOKENS, default_size, middle_patch, unet_levels

_SHORT, _LONG = "a cat", "two cats" + " and a dog" * 16
"""Prompts whose lengths differ in every tokenizer, even with padding to a multiple of 16 or 32
tokens; both fit into CLIP."""

_SAME = 1e-2
"""Two runs with one seed differ by rounding, with two seeds by all of the noise."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a denoiser, by what they depend on.

    ``batched`` have an entry per row; those in ``lists`` are not tensors. ``drawn`` depend on the
    noise, ``timed`` on the step, and ``worded`` among the others on the prompt. ``together``: the
    pipeline takes several prompts. ``alike``: prompts of any length give equal shapes, so they may
    share a run. ``masked``: masks distinguish them, so their rows may not share a forward.
    ``steps`` is the number of steps in a denoising, ``size`` the requested size, ``numbers`` the
    count of numbers in a row's noise, ``given`` the denoiser's output, for its shape.
    """

    batched: Axes
    lists: frozenset[str]
    drawn: frozenset[str]
    timed: frozenset[str]
    worded: frozenset[str]
    together: bool
    alike: bool
    masked: bool
    steps: int
    size: Mapping[str, int]
    numbers: int
    given: Any

    @property
    def moving(self) -> frozenset[str]:
        """The arguments that change at every step."""
        return self.drawn | self.timed


def study(loop: PipelineLoop, calibration: Calibration, *, denoises: bool) -> Arguments:
    """Classify the denoiser's arguments. The denoiser runs only if the calibration denoises.

    Raises :class:`IterisError` if the pipeline cannot run on prompts and the arguments it was
    given.
    """
    try:
        with torch.no_grad(), _trials_unreported():
            return _study(loop, calibration, denoises=denoises)
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


@contextmanager
def _trials_unreported() -> Generator[None]:
    """Silence the libraries' logs: a trial's prompt may be too long, and a trial may fail."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _study(loop: PipelineLoop, calibration: Calibration, *, denoises: bool) -> Arguments:
    size, numbers = pipeline_size(loop, calibration, _SHORT)
    one, two, together = _one_and_two(loop, size)
    batched = batched_in(one, two)
    if rows_in(one, batched) == 2 and loop.unguided:  # guided at a scale of 1
        loop.unguided = 0.0
        return _study(loop, calibration, denoises=denoises)
    long = loop.first_call([_LONG], size)
    first, other = entries(one, batched, 0), entries(two, batched, 0)
    drawn = frozenset(path for path in batched if differ(first[path], other[path], _SAME))
    timed, steps, given = _steps(loop, calibration, size) if denoises else (set[str](), 1, None)
    timed = frozenset(timed - drawn)
    if denoises and not (drawn and timed):
        raise BaseError(
            f"{type(loop.pipeline).__name__} has a denoiser whose noise or timestep cannot be "
            "identified among its arguments; merging on it is not supported."
        )
    still = one.keys() - drawn - timed
    calls = [{path: call.get(path) for path in still} for call in (one, long)]
    kinds = [kind(call, batched, masks=False) for call in calls]
    row = entries(one, batched, 0)
    return Arguments(
        # A timestep may be a single number for all rows.
        batched=batched | {path: 0 for path in timed if getattr(one[path], "ndim", None) == 0},
        lists=frozenset(path for path in batched if not isinstance(one[path], Tensor)),
        drawn=drawn,
        timed=timed,
        worded=frozenset(path for path in still if differ(one[path], long.get(path))),
        together=together,
        alike=together and kinds[0] == kinds[1],
        masked=any(passed(row[path]) is not None for path in batched),
        steps=steps,
        size=size,
        numbers=numbers,
        given=given,
    )


def _one_and_two(loop: PipelineLoop, size: Mapping[str, int]) -> tuple[Call, Call, bool]:
    """Calls with one row and with two, and whether the two may have different prompts. With an
    image to edit, some pipelines take only one prompt, some need an image for each, and some draw
    only one."""
    one = loop.first_call([_SHORT], size)
    try:
        return one, loop.first_call([_SHORT] * 2, size, seed=1), True
    except Exception as error:
        failed = error
    if any(name in loop.names for name in SEVERAL):
        with suppress(Exception):
            return one, loop.first_call([_SHORT], size, seed=1, pictures=2), False
    if loop.each and not loop.one_each:
        loop.one_each = True
        return _one_and_two(loop, size)
    two = _joined(loop, one, loop.first_call([_SHORT], size, seed=1))
    if two is None:
        raise failed
    return one, two, False


def _joined(loop: PipelineLoop, one: Call, other: Call) -> Call | None:
    """A two-row call from two calls; None if the denoiser's output differs for the joined rows."""
    rows = [
        path
        for path, value in one.items()
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == 1
    ]
    two = {**other, **{path: torch.cat([other[path], one[path]]) for path in rows}}
    name = next(iter(loop.denoisers))
    apart = torch.cat([loop.denoise(name, call) for call in (other, one)])
    try:
        together = loop.denoise(name, two)
    except Exception:
        return None
    return None if differ(together, apart, _SAME) else two


def _steps(
    loop: PipelineLoop, calibration: Calibration, size: Mapping[str, int]
) -> tuple[set[str], int, Any]:
    """The arguments that change during denoising, the number of steps, and the denoiser's output.
    The denoiser runs once; after that, ones stand in for its output."""
    given: list[Any] = []

    def calls_of(steps: int) -> list[tuple[str, Call]]:
        calls: list[tuple[str, Call]] = []

        def see(name: str, call: Call, run: Callable[[], Any]) -> Any:
            calls.append((name, call))
            if not given:
                given.append(run())
            return ones_like(given[0], 1)

        start = [torch.Generator().manual_seed(0)]
        loop.run([_SHORT], see, steps=steps, size=size, generators=start)
        return calls

    calls = calls_of(calibration.denoising_steps)
    # With a single step there is nothing to compare.
    seen = calls if calibration.denoising_steps > 1 else calls_of(2)
    later = [call for _, call in seen]
    one = later[0]
    moving = {path for path in one if any(differ(one[path], c.get(path)) for c in later)}
    # Ones change the latents too; the caller separates those that are not drawn.
    pairs = itertools.pairwise(calls)
    steps = 1 + sum(
        who != other or any(differ(a[p], b.get(p)) for p in moving)
        for (who, a), (other, b) in pairs
    )
    return moving, steps, given[0]


def ones_like(output: Any, rows: int) -> Any:
    """An output like a denoiser's one-row ``output``, but with ``rows`` rows of ones."""
    if isinstance(output, Tensor):
        return output.new_ones(rows, *output.shape[1:])
    if isinstance(output, list):  # one tensor per row
        return [torch.ones_like(output[0])] * rows
    if isinstance(output, tuple):
        return tuple(ones_like(part, rows) for part in output)  # pyright: ignore
    if isinstance(output, dict):  # includes diffusers' and transformers' outputs
        return type(output)(**{name: ones_like(part, rows) for name, part in output.items()})  # pyright: ignore
    return output


_SCALES = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_FRAME_SCALES = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
_PIXEL_STEP = 32
"""Every pipeline accepts sides in pixels that are multiples of this."""


def pipeline_size(
    loop: PipelineLoop, calibration: Calibration, prompt: str
) -> tuple[dict[str, int], int]:
    """Height, width and frames to request from a pipeline, and the count of noise numbers per row.

    ``prompt`` can be any prompt.
    """
    size: dict[str, int] = {}
    if "num_frames" in loop.names:
        seconds, fps = (getattr(loop.pipeline, name, 0) for name in ("min_duration", "fps"))
        size["num_frames"] = calibration.frames or max(FRAMES, math.ceil(seconds * fps))
    elif calibration.frames is not None:
        raise SettingsError(
            f"frames is for videos, and {type(loop.pipeline).__name__} draws none; leave it out."
        )
    scale = next((s for s in (getattr(loop.pipeline, n, 0) for n in _SCALES) if s), 8)
    if calibration.latent_size is not None:
        size |= dict.fromkeys(("height", "width"), calibration.latent_size * int(scale))
    sides, latents = _prepared(loop, size, prompt)
    if calibration.latent_size is None and {"height", "width"} <= sides.keys():
        own = sides["height"], sides["width"]
        # The rule, with pixels in place of latents.
        tokens = _tokens(loop, latents, size.get("num_frames", 1))
        patch = max(round(math.sqrt(own[0] * own[1] / tokens)), 1)
        smaller = default_size(1, patch, own, _PIXEL_STEP)
        large = tokens > PICTURE_TOKENS or max(own) > MOST_PIXELS
        if large and "height" in loop.names:
            size |= dict(zip(("height", "width"), smaller, strict=True))
            _, latents = _prepared(loop, size, prompt)
    packed = latents.ndim == 2  # without a batch dimension
    return size, latents.numel() if packed else latents[0].numel()


def _prepared(
    loop: PipelineLoop, size: Mapping[str, int], prompt: str
) -> tuple[dict[str, int], Tensor]:
    """The size that the pipeline passes to its ``prepare_latents``, and the latents from there."""
    pipeline, kept = loop.pipeline, list[Any]()
    unknown = BaseError(f"{type(pipeline).__name__} makes its latents in an unsupported way.")
    if loop.modular is not None:
        loop.first_call([prompt], size)
        sides, latents = loop.modular.prepared(pipeline)
        if latents is None:
            raise unknown
        return sides, latents
    prepare = getattr(pipeline, "prepare_latents", None)
    if prepare is None:
        raise unknown
    names = inspect.signature(prepare)

    def keep(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        kept.append((names.bind(*args, **kwargs).arguments, prepared))
        return prepared

    pipeline.__dict__["prepare_latents"] = keep
    try:
        loop.first_call([prompt], size)
    finally:
        del pipeline.__dict__["prepare_latents"]
    arguments, prepared = kept[0]
    latents = prepared if isinstance(prepared, Tensor) else prepared[0]
    sides = {n: v for n, v in arguments.items() if n in ("height", "width") and v}
    return sides, latents


def _tokens(loop: PipelineLoop, latents: Tensor, frames: int) -> float:
    """Tokens of one frame at the middle block."""
    if latents.ndim < 4:  # packed; for a video, with all frames
        names = (getattr(loop.pipeline, name, 0) for name in _FRAME_SCALES)
        scale = next((int(s) for s in names if s), 1)
        return latents.shape[-2] / ((frames - 1) // scale + 1)
    denoiser = next(iter(loop.denoisers.values()))
    return latents.shape[-2] * latents.shape[-1] / middle_patch(token_sides(denoiser)) ** 2


def token_sides(denoiser: Any) -> list[int]:
    """Latents per token side, in each transformer block of a UNet, or in all of a transformer."""
    if "block_out_channels" in denoiser.config:
        middle = getattr(denoiser, "mid_block", None)
        levels = unet_levels((*denoiser.down_blocks, middle, *denoiser.up_blocks))
        if levels:
            return levels
    patch = denoiser.config.get("patch_size") or denoiser.config.get("all_patch_size") or 1
    return [int(patch[-1] if isinstance(patch, (list, tuple)) else patch)]
