"""The denoiser of a MODEL, run as in ComfyUI's samplers, with positive conditioning only.

ComfyUI prepares the inputs of each text separately for one row, as its sampler does: masks, pooled
outputs, sizes, guidance, references. ComfyUI's own conditioning classes join the rows of a forward,
if their shapes are equal. ``calc_cond_batch`` applies wrappers and hooks as in sampling; one call
is one forward, with rows in order.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..iteris_core.activations.gradients import constant_weights
from ..iteris_core.calibration import Calibration
from ..iteris_core.errors import ModelStateError
from .comfy_conds import Inputs, References, joined, sharing
from .comfy_internals import comfy, memory, optional
from .comfy_runtime import free_beside
from .comfy_sizes import latent_shape
from .comfy_state import (
    differentiable_attention,
    forget,
    in_full_precision,
    observable,
    run_uncompiled,
    training,
)
from .comfy_text import Conditioning

SEED = 0
"""The seed of the noise that some models add to an input image."""
_ONE = "positive"
_SPEEDY = ("lcm", "distilled")
"""Parts of the names of sampling classes for models without guidance."""

_KINDS = {1: "sound", 2: "pictures", 3: "videos"}
"""What latents of so many dimensions are of, besides the batch's and the channels'."""
_WITHOUT_TEXT = frozenset(
    ("SVD_img2vid", "Stable_Zero123", "SeedVR2", "Hunyuan3Dv2", "TripoSplat", "Trellis2",
     "RT_DETR_v4", "SAM3", "DepthAnything3")
)  # fmt: skip
"""Model classes, with those derived from them, that no text reaches."""


class Denoiser:
    """The denoiser of one MODEL, with the user's references; :meth:`close` returns it in the state
    that ComfyUI expects."""

    def __init__(self, model: Any, references: References | None = None) -> None:
        if getattr(model, "additional_models", {}).get("multigpu"):
            raise ModelStateError(
                "MODEL runs on several graphics cards, of which the copies would lack the LoRAs; "
                "connect it from before the node that spreads it."
            )
        self.model = model
        self.references = references or References()
        self._options: dict[str, Any] | None = None
        self._collecting = ExitStack()
        self._conds: dict[str, Any] = {}
        self._others: list[Any] = []
        self._first: Inputs | None = None

    @property
    def distilled(self) -> bool:
        """True if the model runs without guidance and never sees the empty prompt. It is detected
        by a guidance input or a few-step sampling class."""
        config = self.model.model.model_config.unet_config
        kinds = type(self.model.get_model_object("model_sampling")).__mro__
        return (
            bool(config.get("guidance_embed"))
            or config.get("image_model") == "flux"
            or any(word in kind.__name__.lower() for kind in kinds for word in _SPEEDY)
        )

    @property
    def by_step(self) -> bool:
        """True if a forward's rows must share one step: control nets and mean-flow models use only
        the first row's."""
        mean_flow = self.model.model.model_config.unet_config.get("meanflow")
        return bool(mean_flow) or "control" in self.references.entries

    def check(self) -> None:
        """Raise :class:`ModelStateError` if this model's features cannot be collected."""
        config = type(self.model.model.model_config)
        empty = comfy.sample.fix_empty_latent_channels(self.model, torch.zeros(1, 4, 8, 8))
        if not _WITHOUT_TEXT.isdisjoint(kind.__name__ for kind in config.__mro__):
            why = "takes no text, from which a merge by features makes its samples"
        elif empty.is_nested:
            why = "draws a video and its sound together, which a merge by features does not support"
        else:
            self._check_latent()
            return
        raise ModelStateError(
            f"MODEL is a {config.__name__}, which {why}. Use a method that looks at weights alone, "
            "such as average or ties."
        )

    def _check_latent(self) -> None:
        """Raise :class:`ModelStateError` for a connected LATENT that is not of this model."""
        if self.references.latent is None:
            return
        latent = comfy.sample.fix_empty_latent_channels(self.model, self.references.latent)
        format = self.model.get_model_object("latent_format")
        dimensions, channels = latent.ndim - 2, latent.shape[1]
        if dimensions != (wanted := format.latent_dimensions):
            why = f"is of {_KINDS.get(dimensions)}, and this MODEL draws {_KINDS.get(wanted)}"
        elif channels != format.latent_channels:
            why = f"has {channels} channels, and this MODEL's have {format.latent_channels}"
        else:
            return
        raise ModelStateError(
            f"The LATENT {why}. Connect one that this MODEL can draw on, or none: the merge then "
            "chooses the size."
        )

    def close(self) -> None:
        self._collecting.close()
        forget(self.model.model.diffusion_model)
        if self._options is not None:
            comfy.sampler_helpers.cleanup_models(self._conds, self._others)
            self.model.cleanup()
            comfy.samplers.cast_to_load_options(self._options, device=self.model.offload_device)
            self.model.restore_hook_patches()
            self._options = None

    def load(
        self, shape: Sequence[int], schedule: Tensor, text: Conditioning, rows: int, wanted: int = 0
    ) -> None:
        """Prepare the model as ``CFGGuider`` does before sampling, with the memory that ComfyUI
        reserves for ``rows`` rows, and at least ``wanted`` bytes. ``shape`` is (…, channels,
        height, width), ``schedule`` the sigmas of a whole denoising."""
        model = self.model
        if self._options is None:
            self._conds = {_ONE: self._converted(text)}
            self._others, _ = comfy.sampler_helpers.get_additional_models(
                self._conds, model.model_dtype()
            )
            options = comfy.model_patcher.create_model_options_clone(model.model_options)
            self._options = options
            self._collecting.enter_context(in_full_precision(model.model))
            self._collecting.enter_context(observable(model.model.diffusion_model))
            comfy.sampler_helpers.prepare_model_patcher(model, self._conds, options)
            run_uncompiled(options)
            # Other nodes' patches and wrappers read the denoising progress there.
            options["transformer_options"]["sample_sigmas"] = schedule.to(model.load_device)
        shapes = model.model.extra_conds_shapes(**self._conds[_ONE][0])
        reserved = model.model.memory_required(
            [rows, *shape[1:]], cond_shapes={name: [one] * rows for name, one in shapes.items()}
        )
        self.free_memory(max(wanted, math.ceil(reserved)))
        device, dtype = model.load_device, model.model_dtype()
        comfy.samplers.cast_to_load_options(self._options, device=device, dtype=dtype)
        model.pre_run()

    def free_memory(self, wanted: int) -> int:
        """Free bytes besides the denoiser, after ComfyUI has freed ``wanted``: it evicts other
        models first, then the denoiser's own weights."""
        model = self.model
        with torch.inference_mode():
            models = [model, *self._others, *model.get_nested_additional_models()]
            memory.load_models_gpu(models, memory_required=wanted)
        return free_beside(model)

    def shape(self, calibration: Calibration) -> tuple[int, ...]:
        """(1, channels, …) of the latents: the connected LATENT's, otherwise by the size rule."""
        latent = self.references.latent
        if latent is None:
            return latent_shape(self.model, calibration)
        return tuple(comfy.sample.fix_empty_latent_channels(self.model, latent).shape)

    def empty(self, shape: Sequence[int]) -> Tensor:
        """The latent, (1, …), to which denoising adds noise: the connected LATENT."""
        latent = self.references.latent
        if latent is None:
            return torch.zeros(*shape)
        return comfy.sample.fix_empty_latent_channels(self.model, latent).float()

    def schedule(self, steps: int) -> Tensor:
        """The sigmas of a whole denoising (steps + 1)."""
        sampling = self.model.get_model_object("model_sampling")
        scheduler = "simple" if isinstance(sampling, comfy.model_sampling.CONST) else "ddim_uniform"
        return comfy.samplers.calculate_sigmas(sampling, scheduler, steps).float().cpu()

    def shares(self, sigmas: Tensor) -> Tensor:
        """The timesteps of ``sigmas``, as shares of the largest."""
        sampling = self.model.get_model_object("model_sampling")
        return sampling.timestep(sigmas).float() / float(sampling.timestep(sampling.sigma_max))

    def noised(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """The denoiser's input at ``sigma``, from noise and the connected LATENT."""
        sampling = self.model.get_model_object("model_sampling")
        latent, mask = self._begun(noise.shape)
        noisy = sampling.noise_scaling(sigma.reshape(1), noise, latent, True)
        if mask is None:
            return noisy
        with self._shaped(noise.shape):
            kept = self.model.model.scale_latent_inpaint(
                x=noisy, sigma=sigma.reshape(1), noise=noise, latent_image=latent
            )
        return noisy * mask + kept * (1 - mask)

    def inputs(self, text: Conditioning, shape: Sequence[int]) -> Inputs:
        """ComfyUI's inputs for this text and a latent of ``shape`` (…, channels, height, width)."""
        device, shape = self.model.load_device, (1, *shape[1:])
        latent, mask = self._begun(shape)
        with self._shaped(shape):
            inputs = comfy.samplers.process_conds(
                self.model.model,
                torch.zeros(shape, device=device),
                {_ONE: self._converted(text)},
                device,
                latent.to(device),
                None if mask is None else mask.to(device),
                SEED,
                latent_shapes=comfy.utils.pack_latents([latent])[1],
            )[_ONE][0]
        self._first = self._first or inputs
        return sharing(inputs, self._first)

    def predict(self, latents: Tensor, sigmas: Tensor, inputs: Sequence[Inputs]) -> Tensor:
        """The noise in every row, per ``sigmas``, as it is the step of a sampler; one forward, rows
        in order. All ``inputs`` must be of one :func:`.comfy_conds.kind`."""
        device = self.model.load_device
        latents, sigmas = latents.to(device), sigmas.to(device)
        forget(self.model.model.diffusion_model)
        with self._shaped(latents.shape):
            denoised = comfy.samplers.calc_cond_batch(
                self.model.model, [[joined(inputs)]], latents, sigmas, self._options
            )[0]
        return (latents - denoised) / sigmas.reshape(-1, *[1] * (latents.ndim - 1))

    @contextmanager
    def gradients(self) -> Generator[None]:
        """Context in which :meth:`predict` can be differentiated. What is connected beside the
        model, such as a control net, was loaded in inference mode like it."""
        models = [self.model, *self._others, *self.model.get_nested_additional_models()]
        assert self._options is not None
        with ExitStack() as stack:
            stack.enter_context(training())
            stack.enter_context(differentiable_attention(self._options["transformer_options"]))
            for one in models:
                if isinstance(one.model, nn.Module):
                    stack.enter_context(constant_weights(one.model))
            yield

    @contextmanager
    def _shaped(self, shape: Sequence[int]) -> Generator[None]:
        """Context in which the model's latents are of one ``shape``, which ``CFGGuider`` sets in
        later versions; the last picture may have been one with its sound."""
        model = self.model.model
        with ExitStack() as stack:
            if hasattr(model, "latent_shapes"):
                stack.callback(setattr, model, "latent_shapes", model.latent_shapes)
                model.latent_shapes = [tuple(shape)]
            yield

    def _converted(self, text: Conditioning) -> list[dict[str, Any]]:
        conds = comfy.sampler_helpers.convert_cond([self.references.beside(text)])
        controls = [cond["control"] for cond in conds if cond.get("control") is not None]
        hooked = any("hooks" in cond for cond in conds)
        hooked = hooked or any(control.get_extra_hooks() for control in controls)
        # For these models, weights move to the device when used.
        known = optional("comfy.model_patcher.ModelPatcher.is_dynamic") is not None
        if hooked and known and self.model.is_dynamic():
            raise ModelStateError(
                "The CLIP or the CONDITIONING has hooks for MODEL. Under DynamicVRAM these run on "
                "a copy of the model that a merge cannot see. Load the LoRA with Load LoRA "
                "instead of the hook, or start ComfyUI with --disable-dynamic-vram."
            )
        return conds

    def _begun(self, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The connected LATENT on the model's scale, and its mask; on the CPU."""
        latent, mask = self.empty(shape), self.references.mask
        if bool(latent.any()):  # an empty latent is not shifted
            with self._shaped(shape):
                latent = self.model.model.process_latent_in(latent)
        if mask is not None:
            mask = comfy.sampler_helpers.prepare_mask(mask, torch.Size(shape), "cpu")
        return latent, mask
