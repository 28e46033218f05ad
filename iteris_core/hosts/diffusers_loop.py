"""A pipeline of diffusers, run by its own ``__call__``, and what its denoiser's arguments are.

Which arguments have an entry a row, which are drawn, which tell the time and which come from the
words is found by running it a few times to its first steps, never from their names.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.record import Architecture
from ..concepts import Calibration
from ..errors import IterisError, brief
from ..lora_files.experts import second_of
from .recorded import Axes, Call, Recorders, See, batched_in, differ, entries, kind, passed, rows_in
from .sizes import FRAMES, MOST_PIXELS, PICTURE_TOKENS, default_size, middle_patch

_SHORT, _LONG = "a cat", "two cats" + " and a dog" * 16
"""Of unlike length in every tokenizer, also where it pads to a multiple of 16 or 32 tokens; what a
CLIP takes."""

_SAME = 1e-2
"""Two runs of one seed differ by rounding, of two seeds by all of the noise."""

_SCALES = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_FRAME_SCALES = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
_PIXEL_STEP = 32
"""Sides in pixels that every pipeline takes are multiples of it."""


class Enough(Exception):
    """Ends a pipeline's loop once what was wanted is recorded."""


@dataclass(frozen=True)
class Arguments:
    """What a denoiser's arguments are.

    ``batched`` have an entry a row, those of ``lists`` are no tensors; ``drawn`` follow the noise,
    ``timed`` the step, and of the others ``worded`` the prompt. ``together`` says that the pipeline
    takes several prompts, ``alike`` that prompts of all lengths give equal shapes as well, so that
    they may share a run, and ``masked`` that masks tell them apart, so that their rows may not
    share a forward. ``steps`` are those of a whole denoising; ``size`` is what the pipeline is
    asked for; ``numbers`` how many a row's noise has; ``given`` is the denoiser's output, for its
    shape.
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
        """What is another at every step."""
        return self.drawn | self.timed


class PipelineLoop:
    """``call`` are arguments of the pipeline beside the prompt, such as an image."""

    def __init__(self, pipeline: Any, kind: Architecture, call: Mapping[str, Any]) -> None:
        self.pipeline, self._call = pipeline, call
        found = {n: getattr(pipeline, n, None) for n in (kind.denoiser, second_of(kind.denoiser))}
        self.denoisers: dict[str, Any] = {
            n: m for n, m in found.items() if isinstance(m, nn.Module)
        }
        # Without ``torch.no_grad``: polishing goes back through the text encoders.
        self._function = inspect.unwrap(type(pipeline).__call__)
        self._names = inspect.signature(self._function).parameters
        self._recorders = Recorders(self.denoisers)
        self._before: dict[str, Any] = {}
        self._scheduler: tuple[Any, Any] | None = None
        self._open = 0
        self._unguided = 1.0

    @property
    def _distilled(self) -> bool:
        """Whether guidance is an input of the model."""
        given = any(d.config.get("guidance_embeds") for d in self.denoisers.values())
        return given and "guidance_scale" in self._names

    @property
    def _scale_name(self) -> str:
        other = "true_cfg_scale" in self._names and not self._distilled
        return "true_cfg_scale" if other else "guidance_scale"

    @property
    def empty_prompts(self) -> bool:
        """Whether people draw with the empty prompt beside theirs, as the pipeline's default has
        it; models that are distilled for guidance take its scale as an input instead."""
        scale = self._names.get(self._scale_name)
        if scale is None or self._distilled:
            return False
        return not isinstance(scale.default, (int, float)) or scale.default > 1

    def run(
        self,
        prompts: Sequence[str],
        see: See,
        *,
        steps: int,
        size: Mapping[str, int],
        generators: Sequence[torch.Generator],
        guidance: float = 1.0,
        pictures: int = 1,
    ) -> None:
        """Run the loop on ``prompts`` until ``see`` raises :class:`Enough`, or to its end."""
        arguments: dict[str, Any] = {
            "prompt": list(prompts),
            "num_inference_steps": steps,
            "generator": list(generators),
            "output_type": "latent",
            **dict.fromkeys(("num_images_per_prompt", "num_videos_per_prompt"), pictures),
            **size,
            **self._call,
            **self._guidance(guidance, len(prompts)),
        }
        known = {name: value for name, value in arguments.items() if name in self._names}
        with self._ready(), self._recorders.open(see), suppress(Enough):
            self._function(self.pipeline, **known)

    def _guidance(self, scale: float, count: int) -> dict[str, Any]:
        name = self._scale_name
        if self._distilled or name not in self._names:
            return {name: scale} if scale > 1 else {}
        # Of a true scale nothing is made without a negative prompt.
        negative = name == "true_cfg_scale" and scale > 1
        words = {"negative_prompt": [""] * count} if negative else {}
        return {name: scale - 1 + self._unguided, **words}

    @contextmanager
    def _ready(self) -> Generator[None]:
        """A scheduler of its own, no progress bar, and afterwards what was there before."""
        pipeline = self.pipeline
        if not self._open:
            self._before = {
                "scheduler": pipeline.scheduler,
                "_progress_bar_config": getattr(pipeline, "_progress_bar_config", {}),
            }
            if self._scheduler is None or self._scheduler[0] is not pipeline.scheduler:
                self._scheduler = pipeline.scheduler, copy.deepcopy(pipeline.scheduler)
            pipeline.scheduler = self._scheduler[1]
            pipeline.set_progress_bar_config(disable=True)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                for name, value in self._before.items():
                    setattr(pipeline, name, value)
                if getattr(pipeline, "_all_hooks", None):
                    pipeline.maybe_free_model_hooks()

    def first_call(
        self,
        prompts: Sequence[str],
        size: Mapping[str, int],
        steps: int = 2,
        seed: int = 0,
        pictures: int = 1,
    ) -> Call:
        """The arguments of the denoiser's first call, which is not run."""
        found: list[Call] = []

        def see(name: str, call: Call, run: Callable[[], Any]) -> Any:
            found.append(call)
            raise Enough

        generators = [torch.Generator().manual_seed(seed) for _ in range(pictures * len(prompts))]
        self.run(prompts, see, steps=steps, size=size, generators=generators, pictures=pictures)
        return found[0]

    def study(self, calibration: Calibration, *, denoises: bool) -> Arguments:
        """Find out what the denoiser's arguments are; where it is not to denoise, it is not run.

        Raises :class:`IterisError` where the pipeline cannot be run on prompts and what it was
        given.
        """
        try:
            with torch.no_grad():
                return self._study(calibration, denoises=denoises)
        except IterisError:
            raise
        except Exception as error:
            needed = [n for n, p in self._names.items() if p.default is p.empty and n != "self"]
            also = f" (it asks for {', '.join(needed)})" if needed else ""
            raise IterisError(
                f"{type(self.pipeline).__name__} cannot be run on prompts alone{also}: "
                f"{brief(error)}. Give the host what it needs beside them, such as image=…"
            ) from error

    def _study(self, calibration: Calibration, *, denoises: bool) -> Arguments:
        size, numbers = self._size(calibration)
        one, two, together = self._one_and_two(size)
        batched = batched_in(one, two)
        if rows_in(one, batched) == 2 and self._unguided:  # guided at a scale of 1
            self._unguided = 0.0
            return self._study(calibration, denoises=denoises)
        long = self.first_call([_LONG], size)
        first, other = entries(one, batched, 0), entries(two, batched, 0)
        drawn = frozenset(path for path in batched if differ(first[path], other[path], _SAME))
        timed, steps, given = self._steps(calibration, size) if denoises else (set[str](), 1, None)
        timed = frozenset(timed - drawn)
        if denoises and not (drawn and timed):
            raise IterisError(
                f"{type(self.pipeline).__name__} has a denoiser whose noise or time cannot be "
                "told from its arguments; it cannot be merged on here."
            )
        still = one.keys() - drawn - timed
        calls = [{path: call.get(path) for path in still} for call in (one, long)]
        kinds = [kind(call, batched, masks=False) for call in calls]
        row = entries(one, batched, 0)
        return Arguments(
            batched=batched | {path: 0 for path in timed if _is_scalar(one[path])},
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

    def _one_and_two(self, size: Mapping[str, int]) -> tuple[Call, Call, bool]:
        """Calls of one row and of two, and whether the two may be of two prompts: with a picture to
        edit some pipelines take one alone."""
        one = self.first_call([_SHORT], size)
        try:
            return one, self.first_call([_SHORT] * 2, size, seed=1), True
        except Exception:
            return one, self.first_call([_SHORT], size, seed=1, pictures=2), False

    def _steps(
        self, calibration: Calibration, size: Mapping[str, int]
    ) -> tuple[set[str], int, Any]:
        """The arguments that change over a denoising, how many steps it has, and what the denoiser
        gives; it runs once, and then ones stand for its output."""
        calls: list[tuple[str, Call]] = []
        given: list[Any] = []

        def see(name: str, call: Call, run: Callable[[], Any]) -> Any:
            calls.append((name, call))
            if not given:
                given.append(run())
            return ones_like(given[0], 1)

        self.run(
            [_SHORT],
            see,
            steps=calibration.denoising_steps,
            size=size,
            generators=[torch.Generator().manual_seed(0)],
        )
        later = [call for _, call in calls]
        one = later[0]
        moving = {path for path in one if any(differ(one[path], c.get(path)) for c in later)}
        # Ones move the latents, too; those that are not drawn are told apart by the caller.
        pairs = itertools.pairwise(calls)
        steps = 1 + sum(
            who != other or any(differ(a[p], b.get(p)) for p in moving)
            for (who, a), (other, b) in pairs
        )
        return moving, steps, given[0]

    def _size(self, calibration: Calibration) -> tuple[dict[str, int], int]:
        """Height, width and frames to ask for, and how many numbers of noise a row has then."""
        size: dict[str, int] = {}
        if "num_frames" in self._names:
            size["num_frames"] = calibration.frames or FRAMES
        scale = next((s for s in (getattr(self.pipeline, n, 0) for n in _SCALES) if s), 8)
        if calibration.latent_size is not None:
            size |= dict.fromkeys(("height", "width"), calibration.latent_size * int(scale))
        asked, latents = self._asked(size)
        if calibration.latent_size is None and {"height", "width"} <= asked.keys():
            own = asked["height"], asked["width"]
            # The rule, with pixels for latents.
            tokens = self._tokens(latents)
            patch = max(round(math.sqrt(own[0] * own[1] / tokens)), 1)
            sides = default_size(1, patch, own, _PIXEL_STEP)
            large = tokens > PICTURE_TOKENS or max(own) > MOST_PIXELS
            if large and "height" in self._names:
                size |= dict(zip(("height", "width"), sides, strict=True))
                _, latents = self._asked(size)
        return size, latents[0].numel()

    def _asked(self, size: Mapping[str, int]) -> tuple[dict[str, int], Tensor]:
        """What the pipeline asks its ``prepare_latents`` for, and the latents that it gets."""
        pipeline, kept = self.pipeline, list[Any]()
        prepare = getattr(pipeline, "prepare_latents", None)
        if prepare is None:
            raise IterisError(
                f"{type(pipeline).__name__} makes its latents in a way that is not known here."
            )
        names = inspect.signature(prepare)

        def keep(*args: Any, **kwargs: Any) -> Any:
            found = prepare(*args, **kwargs)
            kept.append((names.bind(*args, **kwargs).arguments, found))
            return found

        pipeline.__dict__["prepare_latents"] = keep
        try:
            self.first_call([_SHORT], size)
        finally:
            del pipeline.__dict__["prepare_latents"]
        arguments, found = kept[0]
        latents = found if isinstance(found, Tensor) else found[0]
        sides = {n: v for n, v in arguments.items() if n in ("height", "width") and v}
        return sides, latents

    def _tokens(self, latents: Tensor) -> float:
        """Tokens of one frame at the block in the middle."""
        if latents.ndim == 3:  # packed; of a video with all frames
            names = (getattr(self.pipeline, name, 0) for name in _FRAME_SCALES)
            scale = next((int(s) for s in names if s), 1)
            frames = (FRAMES - 1) // scale + 1 if "num_frames" in self._names else 1
            return latents.shape[1] / frames
        denoiser = next(iter(self.denoisers.values()))
        return latents.shape[-2] * latents.shape[-1] / _patch(denoiser) ** 2


def ones_like(output: Any, rows: int) -> Any:
    """A denoiser's ``output`` of one row, as one of ``rows`` rows, of ones."""
    if isinstance(output, Tensor):
        return output.new_ones(rows, *output.shape[1:])
    if isinstance(output, list):  # a tensor for every row
        return [torch.ones_like(output[0])] * rows
    if isinstance(output, tuple):
        return tuple(ones_like(part, rows) for part in output)  # pyright: ignore
    if isinstance(output, dict):  # also diffusers' and transformers' outputs
        return type(output)(**{name: ones_like(part, rows) for name, part in output.items()})  # pyright: ignore
    return output


def _patch(denoiser: Any) -> int:
    levels = (
        [
            2 ** _level(name, len(denoiser.config.block_out_channels))
            for name, module in denoiser.named_modules()
            if type(module).__name__ == "BasicTransformerBlock"
        ]
        if "block_out_channels" in denoiser.config
        else []
    )
    if levels:
        return middle_patch(levels)
    patch = denoiser.config.get("patch_size") or denoiser.config.get("all_patch_size") or 1
    return int(patch[-1] if isinstance(patch, (list, tuple)) else patch)


def _level(name: str, levels: int) -> int:
    """How often a UNet's block has been halved."""
    side, _, rest = name.partition(".")
    number = int(rest.partition(".")[0]) if side != "mid_block" else levels - 1
    return levels - 1 - number if side == "up_blocks" else number


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0
