"""Methods that exist only for comparison with IterIS, one file each.

``import rivals`` registers all of them beside the core's own methods.
"""

from . import ace, custom_diffusion, iso_c, random_change, ssr

__all__ = ["ace", "custom_diffusion", "iso_c", "random_change", "ssr"]
