"""The words that are known of a LoRA, for the front end to fill in."""

from __future__ import annotations

import asyncio
from typing import Any

from ..iteris_core.errors import IterisError
from ..iteris_core.lora_files import read_header
from ..iteris_core.lora_files.sidecars import find_phrases
from .lora_stacks import lora_path


def words_of_lora(name: str) -> dict[str, str]:
    """``words`` as the nodes take them, and their ``source``; both empty for what is no LoRA."""
    try:
        file = lora_path(name)
        phrases, source = find_phrases(file, read_header(file)[1])
    except (IterisError, FileNotFoundError):
        return {"words": "", "source": ""}
    return {"words": "; ".join(phrases), "source": source}


def add_route() -> None:
    """``GET /iteris/words?lora=NAME``, where there is a server."""
    try:
        from aiohttp import web
        from server import PromptServer

        routes = PromptServer.instance.routes
    except (ImportError, AttributeError):
        return

    @routes.get("/iteris/words")
    async def words(request: Any) -> Any:
        answer = await asyncio.to_thread(words_of_lora, request.query.get("lora", ""))
        return web.json_response(answer)
