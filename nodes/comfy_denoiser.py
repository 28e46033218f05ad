"""The denoiser of a MODEL, run as ComfyUI's samplers run it, positive conditioning only.

``calc_cond_batch`` brings pooled outputs, sizes, guidance, wrappers and hooks as they would be in
sampling; one call is one forward, rows in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

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
from .comfy_text import Conditioning

_LATENT_SIDE = 64
_WAITING = 0.25
"""What a row that waits at a site (skip connections, states) takes of what its forward takes."""

Texts = Callable[[], tuple[list[Conditioning], list[Conditioning]]]
"""The conditioning of every row with its own LoRA active, and each concept's empty one."""


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
        waiting: int = 0,
        statistics: int = 0,
    ) -> None:
        """What ``CFGGuider`` does before it samples, with room for ``rows`` rows in one forward,
        as many ``waiting`` between two sites, and ``statistics`` bytes. ``shape`` is (…, channels,
        height, width), ``schedule`` the sigmas of a whole denoising."""
        model = self._model
        if self._options is None:
            conds = {"positive": comfy.sampler_helpers.convert_cond([list(c) for c in texts[:1]])}
            options = comfy.model_patcher.create_model_options_clone(model.model_options)
            self._options = options
            comfy.sampler_helpers.prepare_model_patcher(model, conds, options)
            _run_uncompiled(options)
            # Patches and wrappers of other nodes look up there how far denoising is.
            options["transformer_options"]["sample_sigmas"] = schedule.to(model.load_device)
        needed = model.model.memory_required([rows + math.ceil(_WAITING * waiting), *shape[1:]])
        with torch.inference_mode():
            memory.load_models_gpu(
                [model, *model.get_nested_additional_models()],
                memory_required=needed + statistics,
            )
        device, dtype = model.load_device, model.model_dtype()
        comfy.samplers.cast_to_load_options(self._options, device=device, dtype=dtype)
        model.pre_run()

    def predict(self, latents: Tensor, sigmas: Tensor, texts: Sequence[Conditioning]) -> Tensor:
        """The denoised latents of every row; one forward, rows in order."""
        device = self._model.load_device
        latents, sigmas = latents.to(device), sigmas.to(device)
        conds = comfy.sampler_helpers.convert_cond([list(_stack(texts))])
        conds = comfy.samplers.encode_model_conds(
            self._model.model.extra_conds,
            conds,
            latents,
            device,
            "positive",
            latent_image=torch.zeros_like(latents),
            denoise_mask=None,
            seed=None,
            latent_shapes=[latents.shape],
        )
        return comfy.samplers.calc_cond_batch(
            self._model.model, [conds], latents, sigmas, self._options
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
        steps, wanted = calibration.denoising_steps, calibration.timesteps
        sampling = self._model.get_model_object("model_sampling")
        scheduler = "simple" if isinstance(sampling, comfy.model_sampling.CONST) else "ddim_uniform"
        schedule = comfy.samplers.calculate_sigmas(sampling, scheduler, steps).float().cpu()
        steps = len(schedule) - 1
        shape = self._latent_shape(calibration.latent_size or _LATENT_SIDE)
        noise = torch.randn(len(owners), *shape, generator=generator)
        picks = torch.stack(
            [torch.randperm(steps, generator=generator)[:wanted] for _ in owners]
        ).sort(dim=1)[0]
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
        self.load(noise.shape, schedule, texts, batch * (1 + guided))
        chunks = [range(n, min(n + batch, len(owners))) for n in range(0, len(owners), batch)]
        for done, rows in enumerate(chunks):
            tick("denoising samples", done, len(chunks))
            some = list(rows)
            chunk_texts = [texts[row] for row in some]
            chunk_owners = [owners[row] for row in some]
            if guided:
                chunk_texts += [empties[owner] for owner in chunk_owners]
                chunk_owners *= 2
            x = start(schedule[0], noise[some]).to(self._model.load_device)
            for step in range(steps):
                row, slot = (picks[some] == step).nonzero(as_tuple=True)
                kept[row + rows.start, slot] = x[row.to(x.device)].to("cpu", kept.dtype)
                sigma, following = float(schedule[step]), float(schedule[step + 1])
                denoised = self._denoise(x, sigma, chunk_texts, chunk_owners, lockstep)
                if guided:
                    positive, negative = denoised.chunk(2)
                    denoised = negative + calibration.guidance * (positive - negative)
                # Euler on this scale of latents is DDIM without noise.
                x = x + (x - denoised) / sigma * (following - sigma)
                memory.throw_exception_if_processing_interrupted()
        tick("denoising samples", len(chunks), len(chunks))
        return kept, schedule[picks], schedule

    def _denoise(
        self,
        x: Tensor,
        sigma: float,
        texts: Sequence[Conditioning],
        owners: Sequence[int],
        lockstep: Lockstep,
    ) -> Tensor:
        """One forward with each row's own LoRA."""
        batch = torch.cat([x] * (len(owners) // len(x)))
        sigmas = torch.full((len(batch),), sigma)
        found: list[Tensor] = []
        lockstep.run(
            MicroBatch(lambda: found.append(self.predict(batch, sigmas, texts)), owners, 1)
        )
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


def _stack(texts: Sequence[Conditioning]) -> Conditioning:
    """One conditioning of as many rows; shorter ones repeat, as ComfyUI's own batches do."""
    length = math.lcm(*(cond.shape[1] for cond, _ in texts))
    cond = torch.cat([cond.repeat(1, length // cond.shape[1], 1) for cond, _ in texts])
    extra = dict(texts[0][1])
    for key, value in extra.items():
        if isinstance(value, Tensor):
            extra[key] = torch.cat([other[key] for _, other in texts])
    return cond, extra
