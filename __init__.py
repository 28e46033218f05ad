"""ComfyUI's way into the pack; elsewhere this is a plain package without nodes."""

import logging
import sys

_OLDEST = (3, 10)


def _lacking() -> str:
    """The packages that the nodes need and that are missing."""
    if sys.version_info[:2] < _OLDEST:
        return f"Python {'.'.join(map(str, _OLDEST))} or newer; this is {sys.version.split()[0]}"
    try:
        import comfy_api.latest  # noqa: F401
    except ImportError:
        return "ComfyUI 0.3.77 or newer, with comfy_api.latest"
    return ""


if _lack := _lacking():
    __all__: list[str] = []
    if "folder_paths" in sys.modules:  # ComfyUI, but an old one
        logging.getLogger(__name__).error("IterIS needs %s; its nodes are not there.", _lack)
else:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
