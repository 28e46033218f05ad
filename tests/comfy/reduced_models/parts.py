"""What all reduced models are made of: a MODEL, a CLIP, random weights, and LoRA files for them."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

RANK = 4


def model_of(config, weights, dtype=torch.float32):
    """The MODEL of a configuration of ``comfy.supported_models``, as its loader makes it;
    ``weights`` are those of a checkpoint that are not the network's. It computes in float32."""
    import comfy.model_management as memory
    import comfy.model_patcher

    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    with torch.inference_mode():
        model = made(config, weights)
        fill(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(
        model, memory.get_torch_device(), memory.unet_offload_device()
    )


def made(config, weights):
    """The model, without what an older ComfyUI does not know of its configuration."""
    while True:
        try:
            return config.get_model(dict(weights), "")
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in config.unet_config:
                raise
            del config.unet_config[unknown[1]]


def model_of_class(kind, extra=None, weights=None, dtype=torch.float32, **config):
    """The MODEL of a class of ``comfy.supported_models``; ``extra`` are other values of what the
    class adds to a configuration, ``weights`` as for :func:`model_of`."""
    import comfy.supported_models

    if not hasattr(comfy.supported_models, kind):
        pytest.skip(f"this ComfyUI has no {kind}")
    plain = getattr(comfy.supported_models, kind)
    values = {**plain.unet_extra_config, **(extra or {})}
    return model_of(
        type(kind, (plain,), {"unet_extra_config": values})(config), weights or {}, dtype
    )


def taken_apart(target):
    """Of an entry of ComfyUI's tables: a weight's key, the place in it, what it makes of one."""
    return (*(target if isinstance(target, tuple) else (target,)), None, None)[:3]


def clip_of(tokenizer, encoder, options, tokenizer_data=None):
    """The CLIP of a tokenizer's and an encoder's class; ``options`` make it narrow."""
    import comfy.sd
    import comfy.supported_models_base

    target = comfy.supported_models_base.ClipTarget(tokenizer, encoder)
    options = {"dtype": torch.float32, **options}
    with torch.inference_mode():
        clip = comfy.sd.CLIP(
            target, model_options=options, tokenizer_data=dict(tokenizer_data or {})
        )
        fill(clip.cond_stage_model)
    return clip


@torch.no_grad()
def fill(module):
    """Random weights of the order of size of trained ones."""
    generator = torch.Generator().manual_seed(0)
    tensors = [*module.named_parameters()]
    tensors += [item for item in module.named_buffers() if item[0].endswith("pos_embed")]
    for name, weight in sorted(tensors):
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            one = ("norm" in name or name.endswith("scale")) and not name.endswith("bias")
            weight.copy_(noise * 0.02 + float(one))
        else:
            weight.copy_(noise * 0.5 / weight[0].numel() ** 0.5)


def write_lora(file, sites, seed, rank=RANK, *, size=0.25, alpha=None, metadata=None):
    """A LoRA with the module names of ``sites``, each (out, in), and numbers of the ``size`` in the
    second factors; with an ``alpha``, as kohya's trainer writes it."""
    generator = torch.Generator().manual_seed(seed)
    up, down = ("lora_B", "lora_A") if alpha is None else ("lora_up", "lora_down")
    tensors: dict[str, Tensor] = {}
    for name, (out, width) in sites.items():
        small = torch.randn(rank, width, generator=generator) / width**0.5
        tensors[f"{name}.{down}.weight"] = small
        tensors[f"{name}.{up}.weight"] = size * torch.randn(out, rank, generator=generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    if alpha is not None:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, file, dict(metadata or {}))
    return file
