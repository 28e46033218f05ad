"""The size rule: latent sizes for common models."""

from statistics import median_high

import pytest

from iteris_core.hosts.sizes import default_size

UNET_LEVELS = {"sd1": [1] * 5 + [2] * 5 + [4] * 5 + [8], "sdxl": [2] * 10 + [4] * 60}


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ((8, median_high(UNET_LEVELS["sd1"]), (64, 64), 8), (64, 64)),
        ((8, median_high(UNET_LEVELS["sdxl"]), (128, 128), 8), (128, 128)),
        ((8, 2, (128, 128)), (64, 64)),  # FLUX.1
        ((8, 1, (8, 8)), (8, 8)),  # smaller than the rule asks for: its own
        ((32, 1), (32, 32)),  # LTX-Video, HunyuanImage 2.1
        ((42, 1), (24, 24)),  # Cascade: 1024 pixels
        ((1, 16), (512, 512)),  # Chroma Radiance: its latents are pixels
        ((8, 2, (60, 104)), (48, 84)),  # Wan 2.1, at its ratio
    ],
)
def test_default_size(arguments, size):
    assert default_size(*arguments) == size


def test_a_side_is_never_nothing():
    assert default_size(8, 2, (1, 400), 8) == (8, 128)
