"""Routes for the front end: a LoRA's known trigger words, what its file says, and its blocks."""

from __future__ import annotations

import asyncio
from typing import Any

from ..iteris_core.architectures import architecture_of_file
from ..iteris_core.concepts import Concept
from ..iteris_core.errors import IterisError
from ..iteris_core.lora_files import read_header
from ..iteris_core.lora_files.blocks import LISTS, PRESETS
from ..iteris_core.lora_files.metadata import public_name
from .concept_specs import lora_path


def words_of_lora(name: str) -> dict[str, str]:
    """``words`` in the nodes' format, and their ``source``; both empty for other files."""
    try:
        file = lora_path(name)
        found = Concept(file=file).with_found_words(read_header(file)[1])
    except IterisError:
        return {"words": "", "source": ""}
    return {"words": "; ".join(found.phrases), "source": found.source}


def about_of_lora(name: str) -> dict[str, list[str]]:
    """``lines`` on a LoRA: its base, its size and its words; empty for other files."""
    try:
        file = lora_path(name)
        shapes, metadata = read_header(file)
        words = words_of_lora(name)
    except IterisError:
        return {"lines": []}
    try:
        kind = architecture_of_file(shapes, metadata).name
    except IterisError:
        kind = ""
    trained_on = public_name(metadata.get("ss_sd_model_name", ""))
    base = " · ".join(dict.fromkeys(filter(None, [kind, trained_on])))
    size = f"{file.stat().st_size / 2**20:.1f} MiB"
    return {"lines": [*filter(None, [base, size, words["words"]])]}


_COUNTS = {"sd1": 17, "sd2": 17, "sdxl": 12, "flux": 61}
"""Architecture → the usual number of block weights."""


def blocks_of_lora(name: str) -> dict[str, Any]:
    """``count``, the usual number of block weights for a LoRA (0: unknown), and all ``lists`` of
    blocks and ``presets`` of weights."""
    try:
        kind = architecture_of_file(*read_header(lora_path(name))).name
    except IterisError:
        kind = ""
    return {"count": _COUNTS.get(kind, 0), "lists": LISTS, "presets": PRESETS}


def add_routes() -> None:
    """Add ``GET /iteris/words?lora=NAME``, ``about`` and ``blocks``, if there is a server."""
    try:
        from aiohttp import web
        from server import PromptServer

        routes = PromptServer.instance.routes
    except (ImportError, AttributeError):
        return

    known = {"words": words_of_lora, "about": about_of_lora, "blocks": blocks_of_lora}
    for path, function in known.items():

        async def answer(request: Any, function: Any = function) -> Any:
            found = await asyncio.to_thread(function, request.query.get("lora", ""))
            return web.json_response(found)

        routes.get(f"/iteris/{path}")(answer)
