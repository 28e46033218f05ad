"""Methods that exist only for comparison with IterIS, one file each.

``import rivals`` registers all of them beside the core's own methods.
"""

from . import (
    ace,
    compress_then_merge,
    core_space,
    custom_diffusion,
    della,
    gradient_fusion,
    iso_c,
    iteris_subspace,
    loraclr,
    orthogonal,
    pico,
    random_change,
    regmean_blocks,
    ssr,
    tsv_m,
    wudi,
)

__all__ = [
    "ace",
    "compress_then_merge",
    "core_space",
    "custom_diffusion",
    "della",
    "gradient_fusion",
    "iso_c",
    "iteris_subspace",
    "loraclr",
    "orthogonal",
    "pico",
    "random_change",
    "regmean_blocks",
    "ssr",
    "tsv_m",
    "wudi",
]
