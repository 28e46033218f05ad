"""FLUX and its kin."""

from . import references as given
from . import texts
from .parts import model_of_class
from .reduced import Reduced


def config(**other):
    return {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 64,
        "context_in_dim": 64, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [], **other,
    }  # fmt: skip


def flux():
    """With CLIP's own width, which diffusers' pipeline of it has too."""
    return model_of_class("Flux", **config(vec_in_dim=768)), texts.flux(texts.FULL_CLIP)


def flux_narrow(kind="Flux", **other):
    """FLUX.1 dev; Kontext is of the same class, and is given reference latents."""
    return model_of_class(kind, **config(**other)), texts.flux()


def _flux2(**other):
    return model_of_class("Flux2", **config(
        image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=192,
        hidden_size=128, mlp_ratio=3.0, axes_dim=[16, 16, 16, 16], theta=2000, patch_size=1,
        qkv_bias=False, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
        default_ref_method="index", ref_index_scale=10.0, **other,
    ))  # fmt: skip


def flux2():
    return _flux2(), texts.mistral()


def klein():
    """Without guidance; the states of three layers of Qwen 3 side by side."""
    return _flux2(guidance_embed=False), texts.klein()


_CHROMA = {
    "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 64, "hidden_dim": 64,
    "n_layers": 2, "vec_in_dim": None,
}  # fmt: skip


def _chroma(**other):
    found = config(**{**_CHROMA, **other})
    del found["guidance_embed"]
    return found


def _pixart_t5():
    return texts.t5xxl("pixart_t5", "PixArtTokenizer", "pixart_te")


def longcat_image():
    found = config(guidance_embed=False, vec_in_dim=None, txt_ids_dims=[1, 2])
    model = model_of_class("LongCatImage", **found)
    return model, texts.qwen25("longcat_image", "LongCatImageTokenizer")


def ovis_image():
    """Feed-forward layers with a gate."""
    found = config(
        guidance_embed=False, vec_in_dim=None, txt_ids_dims=[1, 2], yak_mlp=True, txt_norm=True
    )
    model = model_of_class("Flux", **found)
    return model, texts.qwen3("ovis", "OvisTokenizer", "qwen3_2b")


def chroma():
    return model_of_class("Chroma", **_chroma(image_model="chroma")), _pixart_t5()


def chroma_radiance():
    """Of pixels instead of latents."""
    from comfy.ldm.chroma_radiance.model import ChromaRadianceParams as Params

    later = {"use_sequential_txt_ids": False}
    found = _chroma(
        image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=16,
        nerf_hidden_size=16, nerf_mlp_ratio=2, nerf_depth=1, nerf_max_freqs=4, nerf_tile_size=512,
        nerf_final_head_type="conv", nerf_embedder_dtype=None, use_x0=False,
        **{name: value for name, value in later.items() if name in Params.__dataclass_fields__},
    )  # fmt: skip
    return model_of_class("ChromaRadiance", **found), _pixart_t5()


FLUX = {
    "FLUX.1": Reduced(flux_narrow),
    "FLUX.1 schnell": Reduced(lambda: flux_narrow("FluxSchnell", guidance_embed=False), slow=True),
    "FLUX.1 Kontext": Reduced(flux_narrow, entries=given.edited(16, 6, 6)),
    "FLUX.1 Fill": Reduced(
        # A picture and a mask of 8 × 8 pixels a latent beside the latents.
        lambda: flux_narrow("FluxInpaint", in_channels=96),
        entries=given.inpainted(16),
    ),
    "FLUX.2": Reduced(flux2),
    "FLUX.2 with references": Reduced(flux2, entries=given.edited(128, 6, 6), slow=True),
    "FLUX.2 Klein": Reduced(klein, slow=True),
    "Chroma": Reduced(chroma),
    "Chroma Radiance": Reduced(chroma_radiance, side=64, slow=True),
    "LongCat-Image": Reduced(longcat_image),
    "Ovis-Image": Reduced(ovis_image),
}
