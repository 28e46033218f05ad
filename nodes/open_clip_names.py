"""The architectures of open_clip that need nothing but weights, without importing it: ComfyUI asks
for them when it starts, and a shared graph must not make it fetch anything."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from ..iteris_core.errors import IterisError
from ..iteris_core.lora_files.metadata import parse_object

PAPERS = "ViT-L-14-quickgelu"


@cache
def architectures() -> list[str]:
    """The names, the paper's first; only that where open_clip is not there."""
    spec = importlib.util.find_spec("open_clip")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(Path(folders[0], "model_configs").glob("*.json")) if folders else []
    names = [file.stem for file in files if _is_whole(file)]
    return [PAPERS, *(name for name in names if name != PAPERS)]


def check_open_clip() -> None:
    """Raise :class:`IterisError` where it is not installed."""
    if importlib.util.find_spec("open_clip") is None:
        raise IterisError(
            "CLIP scores need the package open_clip. Install it into ComfyUI's Python (pip install "
            "open_clip_torch), or score with IterIS Vision Scorer. Merges need neither."
        )


def _is_whole(file: Path) -> bool:
    """True if neither its tokenizer nor a tower comes from a hub."""
    config = parse_object(file.read_text(encoding="utf-8"))
    parts = [part for name in ("text_cfg", "vision_cfg") if (part := config.get(name))]
    keys = [key for part in parts for key, value in part.items() if value]
    return not any(key.startswith("hf_") or key == "timm_model_pretrained" for key in keys)
