"""Wan 2.1 and 2.2, and what others have made of them."""

from . import references as given
from . import texts
from .parts import model_of_class
from .reduced import Reduced


def _wan(kind, model_type="t2v", **other):
    config = {
        "image_model": "wan2.1", "model_type": model_type, "dim": 96, "in_dim": 16, "out_dim": 16,
        "num_heads": 2, "num_layers": 2, "ffn_dim": 128, "patch_size": (1, 2, 2), "freq_dim": 32,
        "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
        "text_dim": 64, **other,
    }  # fmt: skip
    return model_of_class(kind, **config), texts.umt5()


SITES = {
    f"diffusion_model.blocks.{block}.{layer}": (96, 96)
    for block in range(2)
    for layer in ("self_attn.q", "self_attn.v", "self_attn.o", "cross_attn.k", "cross_attn.o")
}
"""What a LoRA of it changes."""


def wan():
    """Also either of the two experts of Wan 2.2 14B."""
    return _wan("WAN21_T2V")


def wan_i2v():
    """The first frame beside the latents, and as CLIP sees it beside the text."""
    return _wan("WAN21_I2V", "i2v", in_dim=36)


_FRAMES = 3
_RAYS = {"camera_conditions": given.picture(24, _FRAMES, 64, 64)}
_POSE = {"pose_video_latent": given.picture(16, _FRAMES - 1, 8, 8)}
_FROM_A_PICTURE = {**given.first_frame(16, _FRAMES), **given.seen(1280)}

WAN = {
    "Wan 2.1 T2V": Reduced(wan, video=True),
    "Wan 2.1 I2V": Reduced(wan_i2v, video=True, entries=_FROM_A_PICTURE),
    "Wan 2.2 14B": Reduced(wan, video=True, experts=True),
    "Wan 2.2 5B": Reduced(lambda: _wan("WAN22_T2V", in_dim=48, out_dim=48), video=True, slow=True),
    "Wan 2.1 Fun Control": Reduced(
        lambda: _wan("WAN21_FunControl2V", "i2v", in_dim=48),  # a control video and a first frame
        video=True, slow=True,
        entries={"concat_latent_image": given.picture(32, _FRAMES, 8, 8), **given.seen(1280)},
    ),
    "Wan 2.1 Camera": Reduced(
        lambda: _wan("WAN21_Camera", "camera", in_dim=32),  # its rays, pixel by pixel
        video=True, slow=True,
        entries={
            "concat_latent_image": given.picture(16, _FRAMES, 8, 8), **given.seen(1280), **_RAYS,
        },
    ),
    "Wan 2.2 Camera": Reduced(
        lambda: _wan("WAN22_Camera", "camera_2.2", in_dim=36), video=True,
        entries={**given.first_frame(16, _FRAMES), **_RAYS}, slow=True,
    ),
    "Wan 2.1 VACE": Reduced(
        # Blocks of their own for a control video and its mask.
        lambda: _wan("WAN21_Vace", "vace", vace_layers=2, vace_in_dim=96),
        video=True, entries=given.controlled(_FRAMES),
    ),
    "Wan 2.1 HuMo": Reduced(
        lambda: _wan("WAN21_HuMo", "humo"),  # sound, sixteen tokens a frame
        video=True, slow=True,
        entries={"audio_embed": given.picture(_FRAMES, 8, 5, 1280)},
        apart=("audio_proj.",), left_out="audio_proj: its first layer has 51,200 inputs",
    ),
    "Wan 2.2 S2V": Reduced(
        lambda: _wan("WAN22_S2V", "s2v", audio_dim=32, audio_inject_layers=[0, 1]),
        video=True, slow=True,
        entries={
            "audio_embed": given.picture(25, 32, 4 * _FRAMES),
            "reference_latents": [given.picture(16, 1, 8, 8)],
            "control_video": given.picture(16, _FRAMES, 8, 8),
        },
    ),
    "Wan 2.2 Animate": Reduced(
        # Its face blocks follow every fifth block.
        lambda: _wan("WAN22_Animate", "animate", in_dim=36, num_layers=5),
        video=True, slow=True, entries={**_FROM_A_PICTURE, **_POSE},
        apart=("face_adapter.", "face_encoder."),
        left_out="face_adapter and face_encoder: only a video of a face reaches them",
    ),
    "Wan 2.1 SCAIL": Reduced(
        # A pose video of half the size and a reference picture, as frames of the video.
        lambda: _wan("WAN21_SCAIL", "scail", in_dim=20),
        video=True, slow=True,
        entries={
            "pose_video_latent": given.picture(16, _FRAMES, 4, 4),
            "reference_latents": [given.picture(16, 1, 8, 8)], **given.seen(1280),
        },
    ),
    "Wan 2.1 SCAIL 2": Reduced(
        # Masks besides, of who is who.
        lambda: _wan("WAN21_SCAIL2", "scail2", in_dim=20),
        video=True, slow=True,
        entries={
            "pose_video_latent": given.picture(16, _FRAMES, 4, 4),
            "reference_latents": [given.picture(16, 1, 8, 8)], **given.seen(1280),
            "driving_mask_28ch": given.picture(_FRAMES, 28, 4, 4),
            "ref_mask_28ch": given.picture(_FRAMES + 1, 28, 8, 8),
        },
    ),
    "Wan 2.2 Dancer": Reduced(
        lambda: _wan("WAN22_WanDancer", "wandancer", in_dim=36, audio_inject_layers=[0, 1]),
        video=True, slow=True,
        entries={
            **_FROM_A_PICTURE, "audio_embed": given.picture(30, 35),  # of music
            "clip_vision_output_ref": given.seen(1280)["clip_vision_output"],
        },
        apart=("music_injector.", "head_global."),
        left_out=(
            "music_injector: its input is the same for all rows; head_global: only videos of other "
            "than 30 frames a second reach it"
        ),
    ),
    "Wan Animate 2": Reduced(
        # A video that is followed runs beside the one that is drawn, through the same layers.
        lambda: _wan("WAN_Animate2", "animate2", in_dim=36), video=True, slow=True,
        settings={"schedule": "jacobi"},
        entries={**_FROM_A_PICTURE, **_POSE},
    ),
    "Wan 2.1 FlowRVS": Reduced(
        lambda: _wan("WAN21_FlowRVS", "flow_rvs"), video=True, slow=True
    ),
    "Wan 2.1 causal": Reduced(
        lambda: _wan("WAN21_CausalAR_T2V", causal_ar=True), video=True, slow=True
    ),
}  # fmt: skip
