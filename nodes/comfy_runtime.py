"""ComfyUI around a merge: its device, memory, progress bar, interrupt and text on nodes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from .comfy_internals import comfy, memory

_PLAN = "plan: "  # what the library says before a line of its memory plan
_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_log = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Of any device: CPUs and MPS say it in words only."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if hasattr(memory, "is_oom") and memory.is_oom(error):  # clears asynchronous errors of CUDA
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in words or "out of memory" in words
    )


def free_memory() -> None:
    memory.soft_empty_cache()


def show_progress(node_id: str | None) -> Callable[[str, int, int], None]:
    """A callback that draws the node's progress bar and raises when the user interrupts. The lines
    of the memory plan stay on the node above what is going on."""
    shown: list[str] = []
    plans: list[str] = []

    def on_progress(what: str, done: int, total: int) -> None:
        memory.throw_exception_if_processing_interrupted()
        if what.startswith(_PLAN):
            plans.append(_sentence(what))
            _log.info("IterIS: %s", what)
            show_text("\n".join(plans), node_id)
        elif shown[-1:] != [what]:
            shown.append(what)
            show_text("\n".join([*plans, f"{_sentence(what)} …"]), node_id)
        comfy.utils.ProgressBar(max(total, 1), node_id).update_absolute(done)

    return on_progress


def files_behind(hidden: Any, name: str) -> list[str]:
    """The names of files that nodes behind the input ``name`` load: checkpoints, LoRAs on them."""
    graph: dict[str, Any] = hidden.prompt or {}
    seen: set[str] = set()
    found: list[str] = []
    waiting = [graph.get(hidden.unique_id, {}).get("inputs", {}).get(name)]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, str) and value.lower().endswith(_FILES):
            found.append(value)
        if isinstance(value, list) and value and str(value[0]) not in seen:
            seen.add(str(value[0]))
            waiting += graph.get(str(value[0]), {}).get("inputs", {}).values()
    return found


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def show_text(text: str, node_id: str | None) -> None:
    """Text on the node itself, while there is a server to show it."""
    if node_id is not None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, node_id)
