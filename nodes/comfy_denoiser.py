"""The denoiser of a MODEL, run as ComfyUI's samplers run it, positive conditioning only.

The inputs of each text are made apart, by ComfyUI for one row, as its sampler does: masks, pooled
outputs, sizes, guidance. Those of the rows of a forward are put together by ComfyUI's own classes
of conditioning, and only where they have equal shapes. ``calc_cond_batch`` brings wrappers and
hooks as they would be in sampling; one call is one forward, rows in order.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import comfy.conds
import comfy.model_management as memory
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

from ..iteris_core.activations.lockstep import Lockstep, MicroBatch
from ..iteris_core.concepts import Calibration
from ..iteris_core.hosts.protocol import Tick
from ..iteris_core.hosts.rows import drawn_steps
from ..iteris_core.passes.batches import chunks
from .comfy_text import Conditioning

_LATENT_SIDE = 64

Texts = Callable[[], tuple[list[Conditioning], list[Conditioning]]]
"""The conditioning of every row with its own LoRA active, and each concept's empty one."""

Inputs = dict[str, Any]
"""What ComfyUI makes of a conditioning for one row: a dictionary with ``model_conds``."""


class Denoiser:
    """Of one MODEL; :meth:`close` gives it back as ComfyUI expects it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._options: dict[str, Any] | None = None

    @property
    def distilled(self) -> bool:
        """Whether the model takes guidance as an input and never sees the empty prompt."""
        config = self._model.model.model_config.unet_config
        return bool(config.get("guidance_embed")) or config.get("image_model") == "flux"

    def close(self) -> None:
        if self._options is not None:
            self._model.cleanup()
            comfy.samplers.cast_to_load_options(self._options, device=self._model.offload_device)
            self._model.restore_hook_patches()
            self._options = None

    def load(
        self,
        shape: Sequence[int],
        schedule: Tensor,
        texts: Sequence[Conditioning],
        rows: int,
        wanted: int = 0,
    ) -> None:
        """What ``CFGGuider`` does before it samples, with the room that ComfyUI wants for ``rows``
        rows, and at least ``wanted`` bytes. ``shape`` is (…, channels, height, width), ``schedule``
        the sigmas of a whole denoising."""
        model = self._model
        if self._options is None:
            conds = {"positive": comfy.sampler_helpers.convert_cond([list(c) for c in texts[:1]])}
            options = comfy.model_patcher.create_model_options_clone(model.model_options)
            self._options = options
            comfy.sampler_helpers.prepare_model_patcher(model, conds, options)
            _run_uncompiled(options)
            # Patches and wrappers of other nodes look up there how far denoising is.
            options["transformer_options"]["sample_sigmas"] = schedule.to(model.load_device)
        self.room(max(wanted, math.ceil(model.model.memory_required([rows, *shape[1:]]))))
        device, dtype = model.load_device, model.model_dtype()
        comfy.samplers.cast_to_load_options(self._options, device=device, dtype=dtype)
        model.pre_run()

    def room(self, wanted: int) -> int:
        """The bytes that are free beside the denoiser, once ComfyUI has made room for ``wanted``:
        of other models, and of its own weights where that is not enough."""
        model = self._model
        with torch.inference_mode():
            models = [model, *model.get_nested_additional_models()]
            memory.load_models_gpu(models, memory_required=wanted)
        return memory.get_free_memory(model.load_device)

    def inputs(self, text: Conditioning, shape: Sequence[int]) -> Inputs:
        """What ComfyUI gives the denoiser with a latent of ``shape`` (…, channels, height, width)
        for this text."""
        device = self._model.load_device
        latent = torch.zeros(1, *shape[1:], device=device)
        (found,) = comfy.samplers.encode_model_conds(
            self._model.model.extra_conds,
            comfy.sampler_helpers.convert_cond([list(text)]),
            latent,
            device,
            "positive",
            latent_image=latent,
            denoise_mask=None,
            seed=None,
            latent_shapes=[latent.shape],
        )
        return found

    def predict(self, latents: Tensor, sigmas: Tensor, inputs: Sequence[Inputs]) -> Tensor:
        """The denoised latents of every row; one forward, rows in order. All ``inputs`` must be of
        one :func:`kind`."""
        device = self._model.load_device
        latents, sigmas = latents.to(device), sigmas.to(device)
        return comfy.samplers.calc_cond_batch(
            self._model.model, [[_joined(inputs)]], latents, sigmas, self._options
        )[0]

    def latents(
        self,
        owners: Sequence[int],
        texts_of: Texts,
        calibration: Calibration,
        lockstep: Lockstep,
        batch: int,
        generator: torch.Generator,
        tick: Tick,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (prompts, T, …) on ComfyUI's scale, their sigmas (prompts, T), and the sigmas of
        the whole denoising (steps + 1)."""
        steps = calibration.denoising_steps
        sampling = self._model.get_model_object("model_sampling")
        scheduler = "simple" if isinstance(sampling, comfy.model_sampling.CONST) else "ddim_uniform"
        schedule = comfy.samplers.calculate_sigmas(sampling, scheduler, steps).float().cpu()
        steps = len(schedule) - 1
        shape = self._latent_shape(calibration.latent_size or _LATENT_SIDE)
        noise = torch.randn(len(owners), *shape, generator=generator)
        picks = drawn_steps(len(owners), calibration, steps, generator)
        kept = torch.empty(len(owners), picks.shape[1], *shape)

        def start(sigma: Tensor, rows: Tensor) -> Tensor:
            return sampling.noise_scaling(sigma.cpu(), rows, torch.zeros_like(rows), True)

        if calibration.latents == "noise":
            for slot in range(picks.shape[1]):
                for row, pick in enumerate(picks[:, slot].tolist()):
                    kept[row, slot] = start(schedule[pick], noise[row : row + 1])[0]
            return kept, schedule[picks], schedule

        guided = calibration.guidance > 1 and not self.distilled
        texts, empties = texts_of()
        self.load(noise.shape, schedule, texts, batch)
        # Rows of one prompt share a conditioning.
        made = {id(text): self.inputs(text, noise.shape) for text in [*texts, *empties]}
        inputs, without = ([made[id(text)] for text in some] for some in (texts, empties))
        batches = list(chunks(range(len(owners)), list(map(kind, inputs)), batch))
        for done, rows in enumerate(batches):
            tick("denoising samples", done, len(batches))
            some = list(rows)
            own = [owners[row] for row in some]
            x = start(schedule[0], noise[some]).to(self._model.load_device)
            for step in range(steps):
                row, slot = (picks[some] == step).nonzero(as_tuple=True)
                kept[torch.as_tensor(some)[row], slot] = x[row.to(x.device)].to("cpu", kept.dtype)
                sigma, following = float(schedule[step]), float(schedule[step + 1])
                denoised = self._denoise(x, sigma, [inputs[row] for row in some], own, lockstep)
                if guided:
                    negative = self._denoise(x, sigma, [without[n] for n in own], own, lockstep)
                    denoised = negative + calibration.guidance * (denoised - negative)
                # Euler on this scale of latents is DDIM without noise.
                x = x + (x - denoised) / sigma * (following - sigma)
                memory.throw_exception_if_processing_interrupted()
        tick("denoising samples", len(batches), len(batches))
        return kept, schedule[picks], schedule

    def _denoise(
        self,
        x: Tensor,
        sigma: float,
        inputs: Sequence[Inputs],
        owners: Sequence[int],
        lockstep: Lockstep,
    ) -> Tensor:
        """One forward with each row's own LoRA."""
        sigmas = torch.full((len(x),), sigma)
        found: list[Tensor] = []
        lockstep.run(MicroBatch(lambda: found.append(self.predict(x, sigmas, inputs)), owners, 1))
        return found[0]

    def _latent_shape(self, side: int) -> tuple[int, ...]:
        empty = torch.zeros(1, 4, side, side)
        return tuple(comfy.sample.fix_empty_latent_channels(self._model, empty).shape[1:])


def _run_uncompiled(options: dict[str, Any]) -> None:
    """Hooks on layers are not run inside compiled code; the plain module beneath gives the same."""
    wrappers = options["transformer_options"].get("wrappers", {})
    for found in (wrappers, options.get("to_load_options", {}).get("wrappers", {})):
        for keyed in found.values():
            keyed.pop(COMPILE_KEY, None)


def kind(inputs: Inputs) -> Hashable:
    """Equal for two texts whose rows may share a forward: they have the same inputs, those of equal
    shapes and the constants among them equal."""
    conds = inputs["model_conds"]
    return tuple((name, _shape(conds[name])) for name in sorted(conds))


def size(inputs: Inputs) -> int:
    """How many numbers the inputs of one row hold."""
    return sum(math.prod(cond.size()) for cond in inputs["model_conds"].values())


def _shape(cond: Any) -> Hashable:
    value = cond.cond
    if isinstance(cond, comfy.conds.CONDConstant):
        plain = isinstance(value, (bool, int, float, str, type(None)))
        return type(cond), value if plain else id(value)
    parts = value if isinstance(value, (list, tuple)) else [value]
    return type(cond), tuple(tuple(part.shape) for part in parts)


def _joined(rows: Sequence[Inputs]) -> Inputs:
    """The inputs of several rows as those of one batch; what is not for the model is the first
    row's, as it comes from one CLIP."""
    first, *others = (row["model_conds"] for row in rows)
    conds = {
        name: type(cond)(cond.concat([other[name] for other in others]))
        for name, cond in first.items()
    }
    return {**rows[0], "model_conds": conds, "uuid": uuid.uuid4()}
