"""ComfyUI's runtime for a merge: device, memory, progress bar, interrupt and text on nodes."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

from ..iteris_core.activations.memory import is_out_of_memory
from ..iteris_core.progress import OUTLOOK, Progress
from .comfy_internals import comfy, memory, optional

_WHOLE = 1000  # steps of the bar
_TEXT_EVERY = 0.25  # seconds; the bar itself moves at every step
_log = logging.getLogger(__name__)


def ran_out(error: Exception) -> bool:
    """True for an error that means that memory ran out; clears asynchronous CUDA errors first."""
    is_oom = optional("comfy.model_management.is_oom")
    return (is_oom is not None and is_oom(error)) or is_out_of_memory(error)


def free_beside(patcher: Any) -> int:
    """The bytes that ComfyUI could free on the device of ``patcher``. Under DynamicVRAM, weights
    fill the device and are evicted on demand; if the patcher knows how many, they count as free."""
    device = patcher.load_device
    if optional("comfy.model_patcher.ModelPatcher.get_free_memory") is None:
        return memory.get_free_memory(device)
    return patcher.get_free_memory(device)


def could_free(patcher: Any) -> int:
    """The bytes on the device of ``patcher`` that no other program uses: what is free, and what
    ComfyUI's models take there. The same before and after a merge."""
    device = patcher.load_device
    free: int = memory.get_free_memory(device)
    if device.type == "cpu":
        return free
    loaded = [one for one in memory.current_loaded_models if one.device == device]
    return free + sum(one.model_loaded_memory() for one in loaded)


class CurrentCard(ExitStack):
    """The graphics card on which kernels run that take no device from their tensors; ComfyUI sets
    it around a model's forwards in versions that know several cards. Forwards of a merge are
    interleaved, so it is set once for all of a model's."""

    def be(self, device: Any) -> None:
        self.close()
        if (context := optional("comfy.model_management.cuda_device_context")) is not None:
            self.enter_context(context(device))


class NodeProgress(AbstractContextManager["NodeProgress"]):
    """Shows a merge's progress and time left on its node, and raises when the user interrupts. The
    node then says where it stopped and what is ``kept``. The lines of the plan stay above the
    current status, first the one about the whole merge."""

    def __init__(self, node_id: str | None, kept: str = "Nothing is kept.") -> None:
        self.kept = kept
        self._node_id = node_id
        self._plans: list[str] = []
        self._what, self._said, self._last = "", 0.0, ""
        # ComfyUI would send that of a prompt without a page to all pages.
        self._bar = comfy.utils.ProgressBar(_WHOLE, node_id) if _server() else None

    def __exit__(self, _: Any, error: BaseException | None, *__: Any) -> None:
        at = f" at {self._last}" if self._last else ""
        if isinstance(error, memory.InterruptProcessingException):
            show_text(f"Stopped{at}. {self.kept}", self._node_id)
        elif error is not None:
            show_text(f"Failed{at}.", self._node_id)

    def __call__(self, progress: Progress) -> None:
        if not progress.plan:
            self._last = str(replace(progress, left=None))
        memory.throw_exception_if_processing_interrupted()
        if progress.plan:
            whole = progress.what == OUTLOOK
            self._plans.insert(0 if whole else len(self._plans), _sentence(progress.plan))
            _log.info("IterIS: %s", progress.plan)
        now = time.monotonic()
        if progress.what != self._what or now - self._said > _TEXT_EVERY:
            self._what, self._said = progress.what, now
            line = progress.time_left.capitalize() if progress.plan else _sentence(str(progress))
            show_text("\n".join(filter(None, [*self._plans, line])), self._node_id)
        if self._bar is not None:
            self._bar.update_absolute(round(_WHOLE * progress.share))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _server() -> Any:
    """The server, if the prompt that runs now came from a page."""
    found = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    return found if found is not None and found.client_id is not None else None


def show_text(text: str, node_id: str | None) -> None:
    """Show text on the node, on the page that runs it: web/iteris.js puts it there. ComfyUI's own
    message would go to all pages, and there to whatever node has this number."""
    if node_id is not None and (server := _server()) is not None:
        detail = {"node": node_id, "prompt_id": server.last_prompt_id, "text": text}
        server.send_sync("iteris.text", detail, server.client_id)


def ui_text(text: str) -> dict[str, Any]:
    """What a node shows, for the history and for the front end after a reload (web/iteris.js)."""
    return {"text": [text]}
