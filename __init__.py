"""ComfyUI's way into the pack; elsewhere this is a plain package without nodes."""

import logging
import sys

try:
    import comfy_api.latest  # noqa: F401
except ImportError:
    __all__: list[str] = []
    if "folder_paths" in sys.modules:  # ComfyUI, but an old one
        logging.getLogger(__name__).error(
            "IterIS needs ComfyUI 0.3.77 or newer, with comfy_api.latest; its nodes are not there."
        )
else:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
