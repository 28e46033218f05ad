"""Talks to a running ComfyUI: posts a graph, waits for it, hands back its history."""

import json
import time
import urllib.error
import urllib.request
import uuid
from typing import Any

Graph = dict[str, dict[str, Any]]


class PromptError(Exception):
    """The server refused a graph or a node failed; the message is what the user sees."""


class Client:
    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.base + path, timeout=30) as response:
            data = response.read()
        return json.loads(data) if data[:1] in b"{[" else data

    def post(self, path: str, body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise PromptError(error.read().decode()) from error
        return json.loads(text) if text else None

    def start(self, graph: Graph) -> str:
        return self.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex})["prompt_id"]

    def wait(self, prompt: str, seconds: float = 900) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.get(f"/history/{prompt}")
            if prompt in found:
                return found[prompt]
            time.sleep(0.5)
        raise TimeoutError(f"prompt {prompt} did not finish in {seconds:.0f} s")

    def run(self, graph: Graph) -> dict[str, Any]:
        """Node id → outputs that were shown; raises :class:`PromptError` with the node's error."""
        history = self.wait(self.start(graph))
        for kind, data in history["status"]["messages"]:
            if kind == "execution_error":
                raise PromptError(f"{data['node_type']}: {data['exception_message']}")
            if kind == "execution_interrupted":
                raise PromptError("interrupted")
        return history["outputs"]

    def picture(self, shown: dict[str, str]) -> bytes:
        return self.get(
            f"/view?filename={shown['filename']}&subfolder={shown['subfolder']}&type={shown['type']}"
        )


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
