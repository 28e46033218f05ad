"""ComfyUI's way into the pack; elsewhere this is a plain package without nodes."""

try:
    import comfy_api.latest  # noqa: F401
except ImportError:
    __all__: list[str] = []
else:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
