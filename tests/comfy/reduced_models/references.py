"""What edit, inpainting and image-to-video models are given beside the text: entries of a
CONDITIONING, as ComfyUI's nodes put them there."""

from types import SimpleNamespace

import torch


def picture(*shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(4))


def edited(*shape):
    """Of Reference Latent."""
    return {"reference_latents": [picture(*shape)]}


def inpainted(channels):
    """Of Inpaint Model Conditioning: the right half is to be drawn."""
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    return {"concat_latent_image": picture(channels, 8, 8), "concat_mask": mask}


def beside(channels):
    """Of InstructPix2Pix Conditioning."""
    return {"concat_latent_image": picture(channels, 8, 8)}


def first_frame(channels, frames):
    """Of the nodes that make videos from a picture: it is kept, what follows is drawn."""
    mask = torch.ones(1, 1, frames, 8, 8)
    mask[:, :, 0] = 0
    return {"concat_latent_image": picture(channels, frames, 8, 8), "concat_mask": mask}


def seen(width):
    """Of CLIP Vision Encode: 4 patches and the whole."""
    states = picture(5, width)
    vision = SimpleNamespace(penultimate_hidden_states=states, last_hidden_state=states)
    return {"clip_vision_output": vision}


def prior():
    """Of Stable Cascade's stage B Conditioning."""
    return {"stable_cascade_prior": picture(16, 4, 4)}


def controlled(frames):
    """Of Wan Vace To Video: the control's inactive and reactive halves, and 8 × 8 pixels of its
    mask for each latent."""
    return {
        "vace_frames": [picture(32, frames, 8, 8)],
        "vace_mask": [picture(64, frames, 8, 8)],
        "vace_strength": [0.8],
    }


def unclip(width):
    """Of unCLIP Conditioning."""
    vision = SimpleNamespace(image_embeds=picture(width))
    found = {"clip_vision_output": vision, "strength": 1.0, "noise_augmentation": 0.1}
    return {"unclip_conditioning": [found]}
