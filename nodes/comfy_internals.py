"""The names of ComfyUI's internals that the files ``comfy_*.py`` use, listed in one place.

They may move in any version. All nodes still load then, and a run that needs one that is gone ends
in :func:`sentence` (:func:`.schema.discreet`). Names are looked up on every use, because other
packs replace these functions with their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..iteris_core.errors import IterisError

KNOWN = "0.3.77, 0.8.0 and 0.33.0"
"""The ComfyUI versions with which the tests run."""

NAMES: Mapping[str, Sequence[str]] = {
    "comfy.conds": ("CONDConstant",),
    "comfy.k_diffusion.sampling": ("sample_euler",),
    "comfy.ldm.modules.attention": ("BasicTransformerBlock", "attention_pytorch"),
    "comfy.ldm.modules.diffusionmodules.openaimodel": ("Downsample", "UNetModel", "Upsample"),
    "comfy.lora": ("calculate_weight", "load_lora", "model_lora_keys_clip", "model_lora_keys_unet"),
    "comfy.lora_convert": ("convert_lora",),
    "comfy.model_base": ("ModelType",),
    "comfy.model_management": (
        "InterruptProcessingException", "cast_to_device", "current_loaded_models",
        "get_free_memory", "get_torch_device",
        "intermediate_device", "load_models_gpu", "soft_empty_cache",
        "throw_exception_if_processing_interrupted", "unet_offload_device",
    ),
    "comfy.model_patcher": ("ModelPatcher", "create_model_options_clone"),
    "comfy.model_sampling": ("CONST",),
    "comfy.patcher_extension": ("WrappersMP", "add_wrapper_with_key"),
    "comfy.sample": ("fix_empty_latent_channels",),
    "comfy.sampler_helpers": (
        "cleanup_models", "convert_cond", "get_additional_models", "prepare_mask",
        "prepare_model_patcher",
    ),
    "comfy.samplers": (
        "CFGGuider", "KSAMPLER", "calc_cond_batch", "calculate_sigmas", "cast_to_load_options",
        "process_conds", "sampling_function",
    ),
    "comfy.sd": ("CLIP", "VAE"),
    "comfy.sd1_clip": (
        "SD1ClipModel", "SD1Tokenizer", "SDClipModel", "SDTokenizer", "gen_empty_tokens",
    ),
    "comfy.supported_models": ("SD15",),
    "comfy.supported_models_base": ("ClipTarget",),
    "comfy.utils": ("ProgressBar", "pack_latents", "unet_to_diffusers"),
    "comfy_api.torch_helpers.torch_compile": ("COMPILE_KEY", "TORCH_COMPILE_KWARGS"),
}  # fmt: skip
METHODS: Mapping[str, Sequence[str]] = {
    "comfy.model_patcher.ModelPatcher": (
        "add_patches", "cleanup", "clone", "get_key_patches", "get_model_object",
        "get_nested_additional_models", "model_dtype", "pre_run", "restore_hook_patches",
    ),
    "comfy.sd.CLIP": ("encode_from_tokens_scheduled", "tokenize"),
    "comfy.sd1_clip.SDClipModel": ("encode", "set_clip_options"),
    "comfy.sd1_clip.SDTokenizer": ("_try_get_embedding",),
}  # fmt: skip
"""Methods of objects from a graph; only an advance check finds a missing one."""
ATTRIBUTES: Mapping[str, Sequence[str]] = {
    "comfy.model_patcher.ModelPatcher": (
        "additional_models", "attachments", "callbacks", "forced_hooks", "hook_patches",
        "injections", "weight_wrapper_patches", "wrappers",
    ),
    "comfy.sd.CLIP": (
        "apply_hooks_to_conds", "layer_idx", "tokenizer_options", "use_clip_schedule",
    ),
    "comfy.sd1_clip.SDClipModel": ("return_projected_pooled",),
    "comfy.sd1_clip.SDTokenizer": ("embedding_directory", "inv_vocab"),
}  # fmt: skip
"""What these objects have once they are made. All were there in 0.33.0. Of others there are
``_full_precision_mm`` and ``pre_quant_scale`` (layers), ``clear_kv_cache`` (denoisers),
``latent_shapes`` (models), ``timbre_encoder`` (ACE-Step 1.5) and ``comfy_kitchen``."""
WHERE_THERE: Mapping[str, str] = {
    "comfy.cli_args.args.disable_comfy_compiler": "the compiler records allocations",
    "comfy.cli_args.args.disable_cuda_graphs": "blocks are recorded and replayed",
    "comfy.cli_args.args.disable_metadata": "files are to have no metadata",
    "comfy.model_management.cuda_device_context": "kernels run on the card of their tensors",
    "comfy.model_management.in_training": "fused operations are off",
    "comfy.model_management.is_oom": "knows errors that only mean that memory ran out",
    "comfy.model_patcher.ModelPatcher.get_free_memory": "counts weights that can be evicted",
    "comfy.model_patcher.ModelPatcher.is_dynamic": "DynamicVRAM: weights come when they are used",
    "comfy.model_prefetch.make_prefetch_queue": "weights of the next block come early",
    "comfy.quant_ops.QuantizedTensor": "weights that layers do not always dequantise",
}
"""Names that only some versions have, and their use; :func:`optional` looks them up."""


SINCE: Mapping[str, tuple[int, int]] = {
    "comfy.cli_args.args.disable_cuda_graphs": (0, 33),
    "comfy.model_management.in_training": (0, 33),
    "comfy.model_prefetch.make_prefetch_queue": (0, 33),
}
"""Of :data:`WHERE_THERE`, what every version from this one on must have: without it a merge would
be wrong."""


def check_switches() -> None:
    """Raise :class:`IterisError` if this ComfyUI lacks a switch that its version should have."""
    parts = version().split(".")
    number = tuple(int(part) for part in parts[:2] if part.isdigit())
    gone = [p for p, since in SINCE.items() if number >= since and optional(p) is None]
    if gone:
        raise IterisError(sentence(gone))


def missing() -> list[str]:
    """The names that this ComfyUI lacks."""
    tables = [*NAMES.items(), *METHODS.items()]
    return [
        f"{path}.{name}" for path, names in tables for name in names if _find(path, name) is None
    ]


def optional(path: str) -> Any:
    """The object named in :data:`WHERE_THERE`, or None if this ComfyUI lacks it."""
    if path not in WHERE_THERE:
        raise AttributeError(f"{path} is not among the names that only some versions have")
    owner, _, name = path.rpartition(".")
    return _find(owner, name)


def version() -> str:
    """ComfyUI's version; empty if it does not say."""
    return str(_find("comfyui_version", "__version__") or "")


def sentence(names: Sequence[str]) -> str:
    return (
        f"This ComfyUI ({version() or 'of an unknown version'}) has no {', '.join(names)}, which "
        f"IterIS uses. Versions {KNOWN} are known to work; update IterIS, or use one of them."
    )


def base_of(path: str) -> Any:
    """The class at ``path``, to derive from; ``object`` where it is gone."""
    return _find(*path.rsplit(".", 1)) or object


def _find(path: str, name: str) -> Any:
    """The object called ``name`` in a module, class or object, or None."""
    return getattr(owner_of(path), name, None)


def owner_of(path: str) -> Any:
    """The module, class or object at ``path``, or None."""
    try:
        return importlib.import_module(path)
    except ImportError:
        owner, _, name = path.rpartition(".")
        return _find(owner, name) if owner else None


for _path in NAMES:
    with suppress(ImportError):
        importlib.import_module(_path)
comfy = importlib.import_module("comfy")
memory = importlib.import_module("comfy.model_management")
