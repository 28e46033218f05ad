"""A real ComfyUI: as a server of its own, and as a library in this process.

Needs COMFYUI_PATH, a checkout whose requirements this Python has.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
from contextlib import contextmanager
from pathlib import Path

import pytest
from client import Client

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH", "")
_REDUCED = f"""
import sys

sys.path.append({str(Path(__file__).parent)!r})


class ReducedModel:
    # One by its name, as Load Diffusion Model would give it.
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "make", ("MODEL",)
    PART = 0

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"name": ("STRING", {{}}), "factor": ("FLOAT", {{"default": 1.0}})}}}}

    def make(self, name, factor):
        import reduced_models

        made = getattr(reduced_models, name)()
        for weight in made[0].model.diffusion_model.parameters():
            weight.mul_(factor)
        return (made[self.PART],)


class ReducedClip(ReducedModel):
    RETURN_TYPES = ("CLIP",)
    PART = 1


NODE_CLASS_MAPPINGS = {{"ReducedModel": ReducedModel, "ReducedClip": ReducedClip}}
"""
"""Custom nodes for the server: no checkpoint of a reduced Wan can be detected."""


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a ComfyUI checkout in COMFYUI_PATH")
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.comfyui)
            if not COMFYUI:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def library():
    """``import comfy`` works in this process, on the CPU."""
    sys.path.insert(0, COMFYUI)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


@pytest.fixture(scope="session")
def models(tmp_path_factory, library):
    """ComfyUI's base directory: this pack among the custom nodes, thin checkpoints and LoRAs."""
    from thin_models import write_models

    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    # Help pages are served by folder name, so it is the project's.
    (base / "custom_nodes" / "iteris-lora").symlink_to(ROOT)
    (base / "custom_nodes" / "reduced_models_of_tests.py").write_text(_REDUCED)
    write_models(base / "models")
    return base


@pytest.fixture(scope="session")
def client(models):
    with running(models) as found:
        yield found


@contextmanager
def running(base):
    """A server on the base directory ``base``."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # PYTHONPATH may name this repository, whose `nodes` would shadow ComfyUI's.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    log = (base / "server.log").open("w")
    command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--disable-api-nodes", "--base-directory", str(base)]
    process = subprocess.Popen(
        command, cwd=COMFYUI, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    found_client = Client(port)
    try:
        _wait_until_up(found_client, process, base / "server.log")
        yield found_client
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def _wait_until_up(client, process, log):
    for _ in range(800):
        try:
            client.get("/system_stats")
            return
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None:
                break
            time.sleep(0.5)
    raise RuntimeError(f"ComfyUI did not start: {log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def pack(library, tmp_path_factory):
    """This pack, imported the way ComfyUI does: by its folder, under a name of no meaning."""
    import folder_paths

    folder_paths.set_user_directory(str(tmp_path_factory.mktemp("user")))
    spec = importlib.util.spec_from_file_location(
        "custom-nodes/iteris-lora", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kit(pack, tmp_path):
    from kit import Kit

    return Kit(pack, tmp_path)


@pytest.fixture
def desk(kit, caplog):
    """Runs the merging node, and counts in its log."""
    from kit import SETTINGS

    caplog.set_level("INFO")

    def merge(concepts=None, on=None, settings=None, **values):
        given = {"clip": kit.clip, "samples": 9, **values}
        given["settings"] = {**SETTINGS, **(settings or {})}
        specs = tuple(concepts or kit.concepts())
        run = kit.node("merge_nodes", "IterisMerge").execute
        return run(on or kit.model, specs, **given).result

    merge.merges = lambda: caplog.text.count("IterIS: merged with")
    merge.latents = lambda: caplog.text.count("IterIS: making latents")
    return merge
